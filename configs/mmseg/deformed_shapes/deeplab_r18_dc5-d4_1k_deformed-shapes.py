_base_ = 'deeplab_r18_dc5_1k_deformed-shapes.py'

model = dict(backbone=dict(dilations=(1, 1, 1, 4)))
