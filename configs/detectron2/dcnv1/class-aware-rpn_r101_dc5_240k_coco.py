# Class-aware RPN of Deformable ConvNets (2017), Sections 2.3 and 4.1: an RPN with a softmax over the classes on conv5,
# reduced to 1024 channels; backbone, anchors and data are those of Faster R-CNN there.
from detectron2.config import LazyConfig

from .._base_.parts import KEYS, class_aware_rpn

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel('faster-rcnn_r101_dc5_240k_coco.py', KEYS)
model = class_aware_rpn(model, 1024)
