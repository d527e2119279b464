_base_ = 'mask-rcnn_r18-mdconv-c3-c5_fpn_1k_deformed-shapes.py'

roi_extractor = dict(
    type='DkRoIExtractor',
    roi_layer=dict(type='DkModulatedDeformRoIPool', branch_size=7, deform_fc_channels=256))
model = dict(roi_head=dict(bbox_roi_extractor=roi_extractor, mask_roi_extractor=roi_extractor))
