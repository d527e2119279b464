_base_ = 'class-aware-rpn_r101_dc5_30k_voc0712.py'

model = dict(backbone=dict(dilations=(1, 1, 1, 4)))
