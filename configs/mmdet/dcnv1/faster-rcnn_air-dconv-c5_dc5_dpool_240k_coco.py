_base_ = 'faster-rcnn_air_dc5_240k_coco.py'

model = dict(
    backbone=dict(
        type='DkDeformable',
        network='DkAlignedInceptionResNet',
        exchange=[dict(layer='dconv', select='layer4.*.conv?')]),
    roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(type='DkDeformRoIPool'))))

# The branch of deformable RoI pooling learns at a hundredth of the rate (Section 2.3).
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'offset_fc': dict(lr_mult=0.01)}))
