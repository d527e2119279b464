# Multi-scale testing of Deformable ConvNets (2017, Table 5), for --tta. Box averaging, which the table calls B:
# tta_model.tta_cfg.box_averaging.iterations=1.
tta_model = dict(
    type='DkTTAModel',
    tta_cfg=dict(
        nms=dict(type='nms', iou_threshold=0.5), max_per_img=100, box_averaging=dict(iterations=0)))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(4000, side), keep_ratio=True) for side in (480, 576, 688, 864, 1200, 1400)],
            [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
                               'flip_direction')),
            ],
        ]),
]
