_base_ = 'mask-rcnn_r50_fpn_16e_coco.py'

model = dict(
    backbone=dict(dcn=dict(type='DkDeformConv2d', offset_groups=1), stage_with_dcn=(False, True, True, True)))
