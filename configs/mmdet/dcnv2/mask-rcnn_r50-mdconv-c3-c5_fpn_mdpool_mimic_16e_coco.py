_base_ = 'mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_16e_coco.py'

model = dict(type='DkMimicRCNN')
