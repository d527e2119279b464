from detectron2.config import LazyConfig

from .._base_.parts import KEYS

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'faster-rcnn_r50-dw_fpn_1x_coco.py', KEYS)
model.exchange = [dict(layer='dk', select='backbone.bottom_up.layer*.conv2')]
