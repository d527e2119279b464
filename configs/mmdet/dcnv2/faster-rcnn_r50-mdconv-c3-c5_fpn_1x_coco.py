_base_ = 'faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(dcn=dict(type='DkModulatedDeformConv2d', offset_groups=1), stage_with_dcn=(False, True, True, True)))
