_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'

# The last map of each resolution (Deformable Kernels, Section 4.2).
#
# Only the stem is frozen: deformable kernels come out of rigid weights at rest, and those of conv2 learn as well.
model = dict(
    backbone=dict(
        _delete_=True,
        type='DkMobileNetV2',
        out_indices=(0, 1, 2, 3),
        frozen_stages=0,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://mobilenet_v2')),
    neck=dict(in_channels=[24, 32, 96, 1280]))
