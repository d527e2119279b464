_base_ = 'r50-dw_90e_imagenet.py'

model = dict(backbone=dict(exchange=[dict(layer='dconv', select='layer[234].*.conv2')]))
