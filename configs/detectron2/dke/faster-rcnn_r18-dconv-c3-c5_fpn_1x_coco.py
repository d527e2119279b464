from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_convs

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'faster-rcnn_r18_fpn_1x_coco.py', KEYS)
model = deform_convs(model, 'dconv', '345', 'conv[12]')
