_base_ = 'class-aware-rpn_r101_dc5_30k_voc0712.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer4.*.conv2')]))
