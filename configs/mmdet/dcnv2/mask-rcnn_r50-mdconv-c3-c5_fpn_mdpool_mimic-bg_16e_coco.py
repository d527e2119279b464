_base_ = 'mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_mimic_16e_coco.py'

model = dict(mimic=dict(regions='background'))
