# Made by `python -m dk_detection.datasets.deformed_shapes --task segmentation`; DK_DEFORMED_SHAPES_SEG_ROOT says where.
data_root = '{{$DK_DEFORMED_SHAPES_SEG_ROOT:data/deformed_shapes_seg}}/'
metainfo = dict(
    classes=('background', 'disc', 'triangle', 'square', 'star', 'cross', 'crescent'),
    palette=[[0, 0, 0], [220, 20, 60], [60, 140, 255], [0, 200, 120], [255, 160, 0], [190, 80, 255], [0, 210, 230]])

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(img_path='train', seg_map_path='labels/train'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
            dict(type='PackSegInputs'),
        ]))
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(img_path='val', seg_map_path='labels/val'),
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ]))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
