_base_ = 'mmdet::_base_/models/faster-rcnn_r50-caffe-dc5.py'

# Deformable ConvNets v2, Section 3.3: proposals from conv4; conv5 at stride 16, dilated, reduced to 256 channels by a
# 1x1 convolution, pooled to 7x7; two fully connected layers of 1024. The RPN is as wide as its input, as in Detectron.
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        out_indices=(2, 3), style='pytorch', init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
    neck=dict(type='DkReduceLast', in_channels=2048, out_channels=256),
    rpn_head=dict(type='DkSingleLevelRPNHead', in_level=0, in_channels=1024, feat_channels=1024),
    roi_head=dict(
        bbox_roi_extractor=dict(
            type='DkRoIExtractor', first_level=1, out_channels=256, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=256)))
