_base_ = 'mask-rcnn_r18_fpn_1k_deformed-shapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dke', select='layer[234].*.conv[12]')]))
