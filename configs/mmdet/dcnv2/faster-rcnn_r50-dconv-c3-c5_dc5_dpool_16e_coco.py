_base_ = 'faster-rcnn_r50-dconv-c5_dc5_dpool_16e_coco.py'

model = dict(backbone=dict(stage_with_dcn=(False, True, True, True)))
