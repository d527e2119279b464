_base_ = [
    '../_base_/faster-rcnn_r50_dc5_v1.py',
    '../_base_/coco_detection_600.py',
    '../_base_/schedule_240k.py',
]

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
