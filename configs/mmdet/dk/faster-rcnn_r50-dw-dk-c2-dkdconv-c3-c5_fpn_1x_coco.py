_base_ = 'faster-rcnn_r50-dw_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkResNetDW',
        exchange=[dict(layer='dk', select='layer1.*.conv2'),
                  dict(layer='dkdconv', select='layer[234].*.conv2')]))
