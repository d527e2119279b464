from detectron2.config import LazyConfig

from .._base_.parts import KEYS, use_x101

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'mask-rcnn_r50-dconv-c5_fpn_dpool_16e_coco.py', KEYS)
use_x101(model, dataloader, train)
