_base_ = 'mobilenet-v2_90e_imagenet.py'

model = dict(backbone=dict(exchange=[dict(layer='gdk', select={{_base_.depthwise}})]))
