_base_ = 'faster-rcnn_r50-dw_fpn_1x_coco.py'

# The convolutions of the blocks, for `exchange` in the configs that inherit this one. The first block has no expansion.
depthwise_c2 = ['features.1.conv.0.0', 'features.[23].conv.1.0']
depthwise_c3_c5 = ['features.[4-9].conv.1.0', 'features.1?.conv.1.0']
depthwise = depthwise_c2 + depthwise_c3_c5
pointwise = [
    'features.1.conv.1', 'features.[2-9].conv.0.0', 'features.1?.conv.0.0', 'features.*.conv.2', 'features.18.0'
]
blocks = depthwise + pointwise

# The last map of each resolution (Deformable Kernels, Section 4.2). The weights are torchvision's, or those of the file
# that the environment variable DK_MOBILENET_V2_CHECKPOINT names (docs/configs.md).
model = dict(
    backbone=dict(
        type='DkMobileNetV2',
        init_cfg=dict(checkpoint='{{$DK_MOBILENET_V2_CHECKPOINT:torchvision://mobilenet_v2}}')),
    neck=dict(in_channels=[24, 32, 96, 1280]))

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={
        'kernel_offset': dict(lr_mult=0.1),
        'conv_offset': dict(lr_mult=0.1),
    }))
