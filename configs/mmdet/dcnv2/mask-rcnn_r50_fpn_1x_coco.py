_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/coco_instance.py',
    '../_base_/schedule_1x.py',
    '../_base_/runtime.py',
]
