_base_ = 'faster-rcnn_r50-dw_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkResNetDW',
        exchange=[dict(layer='dk', select='layer*.conv2'),
                  dict(layer='scc', select='layer*.conv[13]', num_experts=2)]))
