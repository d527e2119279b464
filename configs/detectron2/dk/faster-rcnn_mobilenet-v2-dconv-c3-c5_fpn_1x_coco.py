from detectron2.config import LazyConfig

from .._base_.dk import DEPTHWISE_C3_C5
from .._base_.parts import KEYS

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'faster-rcnn_mobilenet-v2_fpn_1x_coco.py', KEYS)
model.exchange = [dict(layer='dconv', select=DEPTHWISE_C3_C5)]
