_base_ = 'mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_16e_coco.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
