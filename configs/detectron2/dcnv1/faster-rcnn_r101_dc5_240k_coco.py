# Faster R-CNN of Deformable ConvNets (2017), Sections 2.3 and 4.1: proposals from conv4; conv5 at stride 16, dilated,
# reduced to 256 channels by a 1x1 convolution; 256 anchors and 128 RoIs an image, shorter sides of 600 pixels.
from detectron2.config import LazyConfig

from .._base_.parts import use_r101
from .._base_.schedule_240k import lr_multiplier, optimizer, train

dataloader, model, tta = LazyConfig.load_rel(
    '../dcnv2/faster-rcnn_r50_dc5_16e_coco.py', ('dataloader', 'model', 'tta'))
use_r101(model, dataloader, train, dilated=True)
model.backbone.bottom_up.freeze_at = 2
model.proposal_generator.post_nms_topk = (2000, 300)
model.proposal_generator.head.conv_dims = [512]
model.roi_heads.batch_size_per_image = 128
model.roi_heads.box_predictor.update(smooth_l1_beta=1.0, test_nms_thresh=0.5)
dataloader.train.total_batch_size = 8
dataloader.train.mapper.augmentations[0].update(short_edge_length=[600], max_size=1000)
dataloader.test.mapper.augmentations[0].update(short_edge_length=600, max_size=1000)
