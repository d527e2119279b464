_base_ = 'mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes.py'

model = dict(backbone=dict(exchange=[dict(layer='dkmdconv', select='layer[234].*.conv[12]')]))
