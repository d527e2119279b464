_base_ = 'mask-rcnn_r50_fpn_16e_coco.py'

model = dict(type='DkMimicRCNN')
