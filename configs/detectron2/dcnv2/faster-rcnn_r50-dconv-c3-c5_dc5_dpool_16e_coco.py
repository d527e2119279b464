from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_pooling

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'faster-rcnn_r50-dconv-c3-c5_dc5_16e_coco.py', KEYS)
deform_pooling(model, optimizer, 'dpool')
