_base_ = 'mask-rcnn_r50-dconv-c5_fpn_dpool_16e_coco.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
