_base_ = 'faster-rcnn_r50-dconv-c3-c5_dc5_16e_coco.py'

model = dict(
    roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(type='DkDeformRoIPool'))))

# The branch of deformable RoI pooling learns at a hundredth of the rate, as in the code of Deformable ConvNets (2017).
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'offset_fc': dict(lr_mult=0.01)}))
