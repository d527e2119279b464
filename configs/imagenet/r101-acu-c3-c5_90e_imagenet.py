_base_ = 'r101_90e_imagenet.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='acu', select='layer[234].*.conv2')]))
