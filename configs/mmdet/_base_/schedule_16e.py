_base_ = 'schedule_1x.py'

# 16 epochs, a tenth of the rate after 10 and after 14 (Deformable ConvNets v2, Section 5.1).
train_cfg = dict(max_epochs=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=16, by_epoch=True, milestones=[10, 14], gamma=0.1),
]
