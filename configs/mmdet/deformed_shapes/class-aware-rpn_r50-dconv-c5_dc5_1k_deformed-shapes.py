_base_ = 'class-aware-rpn_r50_dc5_1k_deformed-shapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer4.*.conv2')]))
