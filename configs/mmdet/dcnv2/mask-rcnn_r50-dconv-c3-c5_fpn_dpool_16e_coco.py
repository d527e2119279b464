_base_ = 'mask-rcnn_r50-dconv-c3-c5_fpn_16e_coco.py'

model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(type='DkRoIExtractor', roi_layer=dict(type='DkDeformRoIPool')),
        mask_roi_extractor=dict(type='DkRoIExtractor', roi_layer=dict(type='DkDeformRoIPool', branch_size=7))))

# The branch of deformable RoI pooling learns at a hundredth of the rate, as in the code of Deformable ConvNets (2017).
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'offset_fc': dict(lr_mult=0.01)}))
