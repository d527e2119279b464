_base_ = 'mmseg::_base_/datasets/pascal_voc12_aug.py'

# VOC 2012 with the additional masks of Hariharan et al.; the environment variable DK_VOC2012_ROOT says where
# JPEGImages and its like lie.
data_root = '{{$DK_VOC2012_ROOT:data/VOCdevkit/VOC2012}}'

# Shorter sides of 360 pixels (Deformable ConvNets, 2017, Section 4.1), longer ones of 600 at most.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(600, 360), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(600, 360), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        datasets=[
            dict(
                type='PascalVOCDataset',
                data_root=data_root,
                data_prefix=dict(img_path='JPEGImages', seg_map_path=folder),
                ann_file=f'ImageSets/Segmentation/{part}.txt',
                pipeline=train_pipeline)
            for folder, part in (('SegmentationClass', 'train'), ('SegmentationClassAug', 'aug'))
        ]))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
