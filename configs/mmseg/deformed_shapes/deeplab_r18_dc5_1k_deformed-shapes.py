# A narrow DeepLab for objects of 14 to 60 pixels that learns from scratch on one CPU core within minutes, at half the
# strides: conv4 and conv5 at 8.
_base_ = ['mmseg::_base_/models/fcn_r50-d8.py', '../_base_/deformed_shapes.py', '../_base_/runtime.py']

norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[50.0] * 3, size=(128, 128)),
    pretrained=None,
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=24,
        stem_channels=24,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 1, 2),
        contract_dilation=False,
        norm_cfg=norm_cfg,
        zero_init_residual=False),
    decode_head=dict(
        in_channels=192,
        channels=128,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        norm_cfg=norm_cfg,
        dropout_ratio=0.0,
        num_classes=7,
        loss_decode=dict(avg_non_ignore=True)),
    auxiliary_head=None)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=1000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=1000, T_max=900),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
    paramwise_cfg=dict(custom_keys={'conv_offset': dict(lr_mult=0.1), 'kernel_offset': dict(lr_mult=0.1)}))
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=2),
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False))
custom_hooks = [dict(type='DkSamplingHook')]
randomness = dict(seed=0)
