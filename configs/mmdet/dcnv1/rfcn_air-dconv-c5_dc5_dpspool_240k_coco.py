_base_ = 'rfcn_air_dc5_240k_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkAlignedInceptionResNet',
        exchange=[dict(layer='dconv', select='layer4.*.conv?')]),
    roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(deform=True))))
