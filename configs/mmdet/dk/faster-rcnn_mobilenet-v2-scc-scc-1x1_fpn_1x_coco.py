_base_ = 'faster-rcnn_mobilenet-v2_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkMobileNetV2',
        exchange=[dict(layer='scc', select={{_base_.blocks}}, num_experts=8)]))
