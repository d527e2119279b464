from detectron2.config import LazyConfig

from .._base_.parts import KEYS, use_r101

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_mimic_16e_coco.py', KEYS)
use_r101(model, dataloader, train)
