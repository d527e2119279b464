from detectron2.config import LazyConfig

from .._base_.parts import KEYS, use_air

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel('faster-rcnn_r101_dc5_240k_coco.py', KEYS)
model = use_air(model, dataloader, train)
