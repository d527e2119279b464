from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_convs, deform_pooling

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'faster-rcnn_r101_dc5_240k_coco.py', KEYS)
model = deform_convs(model, 'dconv', '5')
deform_pooling(model, optimizer, 'dpool')
