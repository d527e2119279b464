_base_ = '../dcnv2/faster-rcnn_r50_dc5_16e_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='acu', select='layer[234].*.conv2')]))
