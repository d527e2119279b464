_base_ = 'r101_90e_imagenet.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer[234].*.conv2')]))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'conv_offset': dict(lr_mult=0.1)}))
