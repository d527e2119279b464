_base_ = 'faster-rcnn_r50-dw_fpn_1x_coco.py'

# The last map of each resolution (Deformable Kernels, Section 4.2).
model = dict(
    backbone=dict(type='DkMobileNetV2', init_cfg=dict(checkpoint='torchvision://mobilenet_v2')),
    neck=dict(in_channels=[24, 32, 96, 1280]))

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={
        'kernel_offset': dict(lr_mult=0.1),
        'conv_offset': dict(lr_mult=0.1),
    }))
