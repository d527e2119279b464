_base_ = [
    '../_base_/faster-rcnn_r50_dc5.py',
    '../_base_/coco_detection.py',
    '../_base_/schedule_16e.py',
    '../_base_/runtime.py',
]
