_base_ = [
    '../_base_/deeplab_r101_dc5.py',
    '../_base_/cityscapes.py',
    '../_base_/schedule_45k.py',
]

model = dict(decode_head=dict(num_classes=19))
