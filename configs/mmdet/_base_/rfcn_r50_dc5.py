_base_ = 'faster-rcnn_r50_dc5_v1.py'

# R-FCN (2016) as in Deformable ConvNets (2017), Section 4.1: proposals from conv4; conv5 at stride 16, dilated, reduced
# to 1024 channels by a 1x1 convolution; score and box maps of 7x7 bins, 128 RoIs an image.
model = dict(
    neck=dict(out_channels=1024),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=80 + 1 + 4,
            roi_layer=dict(_delete_=True, type='DkRFCNPool', output_size=7, in_channels=1024, deform=False)),
        bbox_head=dict(
            _delete_=True,
            type='DkVoteHead',
            num_classes=80,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0))))
