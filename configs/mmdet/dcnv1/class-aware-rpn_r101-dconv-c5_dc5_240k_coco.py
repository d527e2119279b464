_base_ = 'class-aware-rpn_r101_dc5_240k_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer4.*.conv2')]))
