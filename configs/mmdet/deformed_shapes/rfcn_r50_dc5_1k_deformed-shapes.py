# A narrow R-FCN for objects of 14 to 60 pixels, at half the strides: conv4 and conv5 at 8. A RoI costs little, so there
# are as many as in the paper.
_base_ = ['../_base_/rfcn_r50_dc5.py', '../_base_/deformed_shapes.py', '../_base_/schedule_1k.py']

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
    rpn_head=dict(
        in_channels=256,
        feat_channels=64,
        anchor_generator=dict(scales=[2, 4, 8], ratios=[0.6, 1.0, 1.67], strides=[8])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=6 + 1 + 4,
            featmap_strides=[8],
            roi_layer=dict(output_size=3, in_channels=128)),
        bbox_head=dict(num_classes=6)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=600, max_per_img=300),
        rcnn=dict(sampler=dict(num=128, pos_fraction=0.33))),
    test_cfg=dict(rpn=dict(nms_pre=600, max_per_img=300), rcnn=dict(max_per_img=50)))

val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
