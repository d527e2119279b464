_base_ = 'r50-dw_90e_imagenet.py'

model = dict(backbone=dict(exchange=[dict(layer='scc', select='layer*.conv?', num_experts=2)]))
