_base_ = 'deeplab_r101_dc5_45k_cityscapes.py'

model = dict(backbone=dict(dilations=(1, 1, 1, 6)))
