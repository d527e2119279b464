_base_ = ['mmpretrain::_base_/datasets/imagenet_bs32.py', 'mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['dk_detection.mmengine'])

# A config that inherits this one adds the backbone, and to the head its channels.
model = dict(
    type='ImageClassifier',
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=1000, loss=dict(type='CrossEntropyLoss'), topk=(1, 5)))

# ImageNet 2012, in train/ and val/ a folder for each class; the environment variable DK_IMAGENET_ROOT says where.
data_root = '{{$DK_IMAGENET_ROOT:data/imagenet}}'

# Scale and aspect ratio, colours: Deformable Kernels, Appendix D. How strongly colours change it does not say; these
# are the usual values.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

# 90 epochs of batches of 256, 8 x 32 for example; 5 epochs of warm-up from (nearly) zero, then a cosine (Appendix D).
# Weight decay: Section 4.
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=4e-5))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, begin=0, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=85, begin=5, end=90, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=256)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
# Leaves the backbone's weights in a file that the detectors of configs/*/dk start from.
custom_hooks = [dict(type='DkBackboneHook')]
