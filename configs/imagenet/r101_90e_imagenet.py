_base_ = 'r50_90e_imagenet.py'

model = dict(backbone=dict(depth=101))
