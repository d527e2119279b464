_base_ = 'deeplab_r18_dc5_1k_deformed-shapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='mdconv', select='layer[234].*.conv[12]')]))
