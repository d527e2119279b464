_base_ = 'alexnet_90e_imagenet.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='AlexNet', exchange=[dict(layer='dconv', select='features.*')]))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'conv_offset': dict(lr_mult=0.1)}))
