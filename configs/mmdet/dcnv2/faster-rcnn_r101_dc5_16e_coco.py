_base_ = 'faster-rcnn_r50_dc5_16e_coco.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
