_base_ = 'r50-dw_90e_imagenet.py'

model = dict(backbone=dict(exchange=[dict(layer='dk', select='layer*.conv2', scope_size=5)]))
