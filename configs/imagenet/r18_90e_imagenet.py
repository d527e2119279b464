_base_ = '_base_/imagenet_90e.py'

model = dict(
    backbone=dict(type='ResNet', depth=18),
    head=dict(in_channels=512))
