_base_ = 'deeplab_r101_dc5_30k_voc12aug.py'

model = dict(backbone=dict(dilations=(1, 1, 1, 8)))
