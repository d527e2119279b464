_base_ = 'faster-rcnn_r50-dw_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkResNetDW',
        exchange=[dict(layer='dconv', select='layer[234].*.conv2')]))
