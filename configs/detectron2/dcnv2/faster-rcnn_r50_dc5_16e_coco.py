# Deformable ConvNets v2, Section 3.3: proposals from conv4; conv5 at stride 16, dilated, reduced to 256 channels by a
# 1x1 convolution, pooled to 7x7; two fully connected layers of 1024. The RPN is as wide as its input, as in Detectron.
from detectron2.config import LazyCall as L

from dk_detection.detectron2 import DkReduceLast, DkRPN

from .._base_.coco import dataloader, tta
from .._base_.faster_rcnn_fpn import model
from .._base_.parts import use_r50
from .._base_.schedule_16e import lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = False
use_r50(model, dataloader, train, dilated=True)
model.backbone = L(DkReduceLast)(bottom_up=model.backbone.bottom_up, out_channels=256)
model.backbone.bottom_up.out_features = ['res4', 'res5']
model.proposal_generator.update(
    _target_=DkRPN,
    in_features=['res4'],
    pre_nms_topk=(12000, 6000),
    post_nms_topk=(2000, 1000),
    anchor_boundary_thresh=0)
model.proposal_generator.head.update(in_channels=1024, num_anchors=15)
model.proposal_generator.anchor_generator.update(sizes=[[32, 64, 128, 256, 512]], strides=[16])
model.roi_heads.box_in_features = ['res5']
model.roi_heads.box_pooler.update(scales=(1.0 / 16, ), sampling_ratio=2)
