# A Mask R-CNN for objects of 14 to 60 pixels that learns from scratch on two CPU cores within ten minutes: narrow, with
# few proposals, and with normalisations wherever no pretrained weights stand in for them.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/deformed_shapes.py', '../_base_/schedule_1k.py']

roi_extractor = dict(out_channels=64, featmap_strides=[4, 8, 16], finest_scale=28, roi_layer=dict(sampling_ratio=1))
model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[50.0] * 3),
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        zero_init_residual=False,
        init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4, norm_cfg=dict(type='BN')),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], ratios=[0.6, 1.0, 1.67], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=6, reg_class_agnostic=True),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=6)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=48, pos_fraction=0.33))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=50)))

custom_hooks = [dict(type='DkContactSheetHook', layer='backbone.layer3.1.conv2')]
