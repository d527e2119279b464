_base_ = '_base_/imagenet_90e.py'

model = dict(
    backbone=dict(type='DkAlignedInceptionResNet', out_indices=(3, )),
    head=dict(in_channels=2048))
