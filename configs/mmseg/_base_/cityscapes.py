_base_ = 'mmseg::_base_/datasets/cityscapes.py'

# The environment variable DK_CITYSCAPES_ROOT says where leftImg8bit and gtFine lie.
data_root = '{{$DK_CITYSCAPES_ROOT:data/cityscapes}}/'

# Whole images, whose shorter sides are 1024 pixels (Deformable ConvNets, 2017, Section 4.1).
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(2048, 1024), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=1, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
