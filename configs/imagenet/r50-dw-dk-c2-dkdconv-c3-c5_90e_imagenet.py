_base_ = 'r50-dw_90e_imagenet.py'

model = dict(
    backbone=dict(exchange=[
        dict(layer='dk', select='layer1.*.conv2'),
        dict(layer='dkdconv', select='layer[234].*.conv2'),
    ]))
