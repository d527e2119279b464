# A classifier of the deformed shapes that learns in minutes on a CPU: a RegNet of five blocks, all of whose 3x3
# convolutions but the first are depthwise, for images of 32 x 32 pixels. docs/study.md has what it is for.
_base_ = 'mmpretrain::_base_/default_runtime.py'

custom_imports = dict(imports=['dk_detection.mmengine'])
data_root = '{{$DK_DEFORMED_SHAPES_CLS_ROOT:data/deformed_shapes_cls}}/'
metainfo = dict(classes=('crescent', 'cross', 'disc', 'square', 'star', 'triangle'))

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[76.5], std=[85.0]),
    backbone=dict(
        type='RegNet',
        arch=dict(w0=16, wa=12, wm=2, group_w=1, depth=5, bot_mul=1),  # widths 16, 32, 32, 64, 64
        in_channels=1,
        stem_channels=16,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2, ),
        zero_init_residual=False),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=6, in_channels=64, loss=dict(type='CrossEntropyLoss')))

train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ImageNet',
        data_root=data_root,
        split='train',
        metainfo=metainfo,
        pipeline=[
            dict(type='DkColourDistance', size=32),
            dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
            dict(type='PackInputs'),
        ]))
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ImageNet',
        data_root=data_root,
        split='val',
        metainfo=metainfo,
        pipeline=[dict(type='DkColourDistance', size=32), dict(type='PackInputs')]))
test_dataloader = val_dataloader
val_evaluator = dict(type='DkAccuracyByDeformation', table=data_root + 'meta/val.csv')
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
val_cfg = dict()
test_cfg = dict()
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=40, end=376, T_max=336),
]
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4),
    paramwise_cfg=dict(custom_keys={'conv_offset': dict(lr_mult=0.01), 'kernel_offset': dict(lr_mult=0.01)}))
default_hooks = dict(logger=dict(interval=47), checkpoint=dict(interval=1, max_keep_ckpts=1))
custom_hooks = [dict(type='DkSamplingHook')]
log_processor = dict(window_size=47)
randomness = dict(seed=0)
