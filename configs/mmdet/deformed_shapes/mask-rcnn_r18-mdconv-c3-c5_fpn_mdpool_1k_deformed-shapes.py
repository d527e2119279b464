_base_ = 'mask-rcnn_r18-mdconv-c3-c5_fpn_1k_deformed-shapes.py'

roi_extractor = dict(
    type='DkRoIExtractor',
    roi_layer=dict(type='DkModulatedDeformRoIPool', branch_size=7, deform_fc_channels=256))
model = dict(roi_head=dict(bbox_roi_extractor=roi_extractor, mask_roi_extractor=roi_extractor))

# AdamW takes steps of the same size however small the gradients are: at the full rate bins wander off before the heads
# have learned anything.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'offset_fc': dict(lr_mult=0.1)}))
