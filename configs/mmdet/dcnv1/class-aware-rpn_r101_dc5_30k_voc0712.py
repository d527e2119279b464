_base_ = [
    '../_base_/class-aware-rpn_r50_dc5.py',
    '../_base_/voc0712.py',
    '../_base_/schedule_30k.py',
]

model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')),
    bbox_head=dict(num_classes=20, anchor_generator=dict(scales=[8, 16, 32])))
