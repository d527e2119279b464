_base_ = 'mask-rcnn_r50-dconv-c5_fpn_dpool_16e_coco.py'

model = dict(
    backbone=dict(
        type='ResNeXt', depth=101, groups=32, base_width=8,
        init_cfg=dict(checkpoint='torchvision://resnext101_32x8d')))
