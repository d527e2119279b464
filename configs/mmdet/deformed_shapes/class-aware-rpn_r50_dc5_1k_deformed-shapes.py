# A narrow class-aware RPN for objects of 14 to 60 pixels, at half the strides: conv4 and conv5 at 8.
_base_ = ['../_base_/class-aware-rpn_r50_dc5.py', '../_base_/deformed_shapes.py', '../_base_/schedule_1k.py']

model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[50.0] * 3),
    backbone=dict(
        base_channels=16,
        stem_channels=16,
        strides=(1, 2, 1, 1),
        frozen_stages=-1,
        norm_cfg=dict(requires_grad=True),
        norm_eval=False,
        init_cfg=None),
    neck=dict(in_channels=512, out_channels=128),
    bbox_head=dict(
        num_classes=6,
        in_channels=128,
        feat_channels=64,
        anchor_generator=dict(scales=[2, 4, 8], ratios=[0.6, 1.0, 1.67], strides=[8])),
    train_cfg=dict(sampler=dict(num=128)),
    test_cfg=dict(nms_pre=200, max_per_img=50))

val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
