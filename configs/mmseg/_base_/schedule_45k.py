_base_ = 'schedule_30k.py'

# 45,000 batches (Deformable ConvNets, 2017, Section 4.1).
train_cfg = dict(max_iters=45000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=45000, milestones=[30000], gamma=0.1),
]
