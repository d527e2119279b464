_base_ = [
    '../_base_/rfcn_r50_dc5.py',
    '../_base_/coco_detection_600.py',
    '../_base_/schedule_240k.py',
]

# Weights of Aligned-Inception-ResNet, trained on ImageNet, are published nowhere; configs/imagenet makes them. The
# environment variable DK_AIR_CHECKPOINT says where yours lie (docs/configs.md).
model = dict(
    backbone=dict(
        _delete_=True,
        type='DkAlignedInceptionResNet',
        dilated_c5=True,
        out_indices=(2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained', checkpoint='{{$DK_AIR_CHECKPOINT:work_dirs/air_90e_imagenet/backbone.pth}}')))
