from detectron2.config import LazyConfig

from .._base_.parts import KEYS, use_x101

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'faster-rcnn_r50-mdconv-c3-c5_dc5_mdpool_mimic_16e_coco.py', KEYS)
use_x101(model, dataloader, train, dilated=True)
