_base_ = 'mobilenet-v2_90e_imagenet.py'

model = dict(
    backbone=dict(exchange=[
        dict(layer='dk', select={{_base_.depthwise_c2}}),
        dict(layer='dkdconv', select={{_base_.depthwise_c3_c5}}),
    ]))
