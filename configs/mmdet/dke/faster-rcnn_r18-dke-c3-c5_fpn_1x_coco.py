_base_ = 'faster-rcnn_r18_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dke', select='layer[234].*.conv[12]')]))
