_base_ = '_base_/imagenet_90e.py'

# The convolutions of the blocks, for `exchange` in the configs that inherit this one. The first block has no expansion.
depthwise_c2 = ['features.1.conv.0.0', 'features.[23].conv.1.0']
depthwise_c3_c5 = ['features.[4-9].conv.1.0', 'features.1?.conv.1.0']
depthwise = depthwise_c2 + depthwise_c3_c5
pointwise = [
    'features.1.conv.1', 'features.[2-9].conv.0.0', 'features.1?.conv.0.0', 'features.*.conv.2', 'features.18.0'
]
blocks = depthwise + pointwise

model = dict(
    backbone=dict(type='DkDeformable', network='DkMobileNetV2', out_indices=(3, ), exchange=[]),
    head=dict(in_channels=1280))

# What makes the offsets learns at a part of the rate: Deformable Kernels, Section 4. The routing of conditional
# convolutions makes no offsets and learns at the full rate.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={
        'kernel_offset': dict(lr_mult=0.1),
        'conv_offset': dict(lr_mult=0.1),
    }))
