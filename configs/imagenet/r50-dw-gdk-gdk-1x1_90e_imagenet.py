_base_ = 'r50-dw_90e_imagenet.py'

model = dict(
    backbone=dict(exchange=[
        dict(layer='gdk', select='layer*.conv2'),
        dict(layer='gdk', select='layer*.conv[13]'),
    ]))
