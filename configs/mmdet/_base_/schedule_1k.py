_base_ = 'runtime.py'

# 1000 batches of a small detector that learns from random weights.
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
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=2), logger=dict(interval=20))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
