_base_ = 'runtime.py'

# 240,000 batches of 8 images, one on each of 8 GPUs, a tenth of the rate after two thirds (Deformable ConvNets, 2017,
# Section 4.1). Offsets learn at the full rate. Momentum, weight decay and warm-up the paper does not give.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=240000, val_interval=40000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=240000, milestones=[160000], gamma=0.1),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.001, momentum=0.9, weight_decay=0.0005),
    paramwise_cfg=dict(custom_keys={}))
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000, max_keep_ckpts=3))
log_processor = dict(by_epoch=False)
