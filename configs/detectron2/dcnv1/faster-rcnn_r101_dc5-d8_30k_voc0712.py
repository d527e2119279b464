from detectron2.config import LazyConfig

from .._base_.parts import KEYS, dilate

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'faster-rcnn_r101_dc5_30k_voc0712.py', KEYS)
dilate(model, 8)
