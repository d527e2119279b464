_base_ = 'faster-rcnn_r50_dc5_16e_coco.py'

model = dict(type='DkMimicRCNN')
