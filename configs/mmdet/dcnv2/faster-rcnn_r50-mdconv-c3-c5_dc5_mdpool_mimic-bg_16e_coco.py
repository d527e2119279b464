_base_ = 'faster-rcnn_r50-mdconv-c3-c5_dc5_mdpool_mimic_16e_coco.py'

model = dict(mimic=dict(regions='background'))
