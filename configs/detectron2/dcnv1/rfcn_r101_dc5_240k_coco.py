# R-FCN (2016) as in Deformable ConvNets (2017), Section 4.1: as Faster R-CNN there; conv5 reduced to 1024 channels,
# score and box maps of 7x7 bins.
from detectron2.config import LazyConfig

from .._base_.parts import KEYS, vote

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel('faster-rcnn_r101_dc5_240k_coco.py', KEYS)
model.backbone.out_channels = 1024
vote(model, 1024, 7)
