_base_ = 'faster-rcnn_r50_dc5.py'

# Faster R-CNN of Deformable ConvNets (2017), Sections 2.3 and 4.1: 256 anchors and 128 RoIs an image.
model = dict(
    rpn_head=dict(feat_channels=512),
    roi_head=dict(
        bbox_head=dict(loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1.0, loss_weight=1.0))),
    train_cfg=dict(rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(max_per_img=300)))
