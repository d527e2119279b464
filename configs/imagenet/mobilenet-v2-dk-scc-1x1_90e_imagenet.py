_base_ = 'mobilenet-v2_90e_imagenet.py'

model = dict(
    backbone=dict(exchange=[
        dict(layer='dk', select={{_base_.depthwise}}),
        dict(layer='scc', select={{_base_.pointwise}}, num_experts=8),
    ]))
