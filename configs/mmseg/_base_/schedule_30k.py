_base_ = ['mmseg::_base_/schedules/schedule_20k.py', 'runtime.py']

# 30,000 batches of 8 images, one on each of 8 GPUs, a tenth of the rate after two thirds (Deformable ConvNets, 2017,
# Section 4.1). Offsets learn at the full rate. Momentum, weight decay and warm-up the paper does not give.
train_cfg = dict(max_iters=30000, val_interval=5000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=30000, milestones=[20000], gamma=0.1),
]
optim_wrapper = dict(
    optimizer=dict(lr=0.001, momentum=0.9, weight_decay=0.0005), paramwise_cfg=dict(custom_keys={}))
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(checkpoint=dict(interval=5000, max_keep_ckpts=3))
