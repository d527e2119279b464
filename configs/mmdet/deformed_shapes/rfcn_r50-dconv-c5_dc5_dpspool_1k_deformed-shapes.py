_base_ = 'rfcn_r50_dc5_1k_deformed-shapes.py'

model = dict(
    backbone=dict(
        type='DkDeformable', network='ResNet', exchange=[dict(layer='dconv', select='layer4.*.conv2')]),
    roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(deform=True))))
