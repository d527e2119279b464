_base_ = 'faster-rcnn_r50-dw_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkResNetDW',
        exchange=[dict(layer='gdk', select='layer*.conv2')]))
