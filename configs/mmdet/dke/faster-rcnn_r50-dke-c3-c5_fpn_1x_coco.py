_base_ = '../dcnv2/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dke', select='layer[234].*.conv2')]))
