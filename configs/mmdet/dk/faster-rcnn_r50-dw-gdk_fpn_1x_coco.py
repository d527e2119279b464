_base_ = 'faster-rcnn_r50-dw_fpn_1x_coco.py'

model = dict(backbone=dict(conv3x3='gdk'))
