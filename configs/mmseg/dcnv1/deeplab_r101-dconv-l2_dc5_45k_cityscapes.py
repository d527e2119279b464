_base_ = 'deeplab_r101_dc5_45k_cityscapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer4.[12].conv2')]))
