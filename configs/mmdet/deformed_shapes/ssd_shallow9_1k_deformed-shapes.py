# Section 7 of Differentiable Kernel Evolution (2019), its faces exchanged for deformed shapes: nine layers, of which
# the last three exist once for the small and once for the large anchors. The paper's anchors are square, of 16 to
# 362 pixels; these suit objects of 14 to 60.
_base_ = ['../_base_/deformed_shapes.py', '../_base_/schedule_1k.py']

model = dict(
    type='SingleStageDetector',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[128.0] * 3, std=[50.0] * 3, bgr_to_rgb=True),
    backbone=dict(type='DkShallow9', width=16),
    bbox_head=dict(
        type='DkSSDHead',
        num_classes=6,
        in_channels=(128, 128),
        anchor_generator=dict(
            type='SSDAnchorGenerator',
            scale_major=False,
            strides=[8, 8],
            min_sizes=[14, 36],
            max_sizes=[36, 80],
            ratios=[[2], [2]]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.0, gt_max_assign_all=False),
        sampler=dict(type='PseudoSampler'),
        smoothl1_beta=1.0,
        allowed_border=-1,
        pos_weight=-1,
        neg_pos_ratio=3,
        debug=False),
    test_cfg=dict(
        nms_pre=200, nms=dict(type='nms', iou_threshold=0.45), min_bbox_size=0, score_thr=0.02, max_per_img=50))

val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=0.002))
