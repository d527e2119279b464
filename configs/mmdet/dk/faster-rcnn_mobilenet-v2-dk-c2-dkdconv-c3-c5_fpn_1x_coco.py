_base_ = 'faster-rcnn_mobilenet-v2_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkMobileNetV2',
        exchange=[dict(layer='dk', select={{_base_.depthwise_c2}}),
                  dict(layer='dkdconv', select={{_base_.depthwise_c3_c5}})]))
