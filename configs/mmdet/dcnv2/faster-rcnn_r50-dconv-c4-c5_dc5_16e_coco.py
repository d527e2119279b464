_base_ = 'faster-rcnn_r50_dc5_16e_coco.py'

model = dict(
    backbone=dict(dcn=dict(type='DkDeformConv2d', offset_groups=1), stage_with_dcn=(False, False, True, True)))
