_base_ = 'schedule_240k.py'

# The same for PASCAL VOC: 30,000 batches.
train_cfg = dict(max_iters=30000, val_interval=10000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=30000, milestones=[20000], gamma=0.1),
]
