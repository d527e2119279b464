_base_ = 'mask-rcnn_x101-32x8d-mdconv-c3-c5_fpn_mdpool_16e_coco.py'

model = dict(type='DkMimicRCNN')
