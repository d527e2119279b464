_base_ = [
    '../_base_/deeplab_r101_dc5.py',
    '../_base_/voc12aug.py',
    '../_base_/schedule_30k.py',
]

model = dict(decode_head=dict(num_classes=21))
