_base_ = 'faster-rcnn_mobilenet-v2_fpn_1x_coco.py'

model = dict(backbone=dict(conv3x3='gdk'))
