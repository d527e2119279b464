_base_ = [
    '../_base_/class-aware-rpn_r50_dc5.py',
    '../_base_/coco_detection_600.py',
    '../_base_/schedule_240k.py',
]

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
