_base_ = [
    '../_base_/rfcn_r50_dc5.py',
    '../_base_/voc0712.py',
    '../_base_/schedule_30k.py',
]

model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')),
    rpn_head=dict(anchor_generator=dict(scales=[8, 16, 32])),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=20 + 1 + 4), bbox_head=dict(num_classes=20)))
