_base_ = 'faster-rcnn_x101-32x8d-mdconv-c3-c5_dc5_mdpool_16e_coco.py'

model = dict(type='DkMimicRCNN')
