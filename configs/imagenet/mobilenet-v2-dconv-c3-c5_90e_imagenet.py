_base_ = 'mobilenet-v2_90e_imagenet.py'

model = dict(backbone=dict(exchange=[dict(layer='dconv', select={{_base_.depthwise_c3_c5}})]))
