_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/coco_instance.py',
    '../_base_/schedule_16e.py',
    '../_base_/runtime.py',
]

# Samples of a bin and number of proposals as in Deformable ConvNets v2, Sections 3.2 and 5.1.
model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=2))),
    train_cfg=dict(rpn_proposal=dict(max_per_img=2000)))
