_base_ = 'deeplab_r18_dc5_1k_deformed-shapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer4.*.conv[12]')]))
