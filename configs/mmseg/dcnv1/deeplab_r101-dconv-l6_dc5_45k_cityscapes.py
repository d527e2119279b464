_base_ = 'deeplab_r101_dc5_45k_cityscapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='ResNet',
        exchange=[dict(layer='dconv', select=['layer3.2[012].conv2', 'layer4.*.conv2'])]))
