_base_ = '_base_/imagenet_90e.py'

model = dict(
    backbone=dict(type='DkDeformable', network='DkResNetDW', out_indices=(3, ), exchange=[]),
    head=dict(in_channels=2048))

# What makes the offsets learns at a part of the rate: Deformable Kernels, Section 4. The routing of conditional
# convolutions makes no offsets and learns at the full rate.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={
        'kernel_offset': dict(lr_mult=0.01),
        'conv_offset': dict(lr_mult=0.01),
    }))
