_base_ = 'mobilenet-v2_90e_imagenet.py'

model = dict(backbone=dict(exchange=[dict(layer='scc', select={{_base_.blocks}}, num_experts=8)]))
