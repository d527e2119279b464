_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'

# Weights of ResNet-50-DW, trained on ImageNet, are published nowhere; configs/imagenet makes them. Those of the rigid
# one fit all of its deformable twins. The environment variable DK_R50_DW_CHECKPOINT says where yours lie
# (docs/configs.md).
#
# Only the stem is frozen: deformable kernels come out of rigid weights at rest, and those of conv2 learn as well.
model = dict(
    backbone=dict(
        _delete_=True,
        type='DkResNetDW',
        out_indices=(0, 1, 2, 3),
        frozen_stages=0,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$DK_R50_DW_CHECKPOINT:work_dirs/r50-dw_90e_imagenet/backbone.pth}}')))
