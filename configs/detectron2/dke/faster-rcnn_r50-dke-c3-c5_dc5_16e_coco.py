from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_convs

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    '../dcnv2/faster-rcnn_r50_dc5_16e_coco.py', KEYS)
model = deform_convs(model, 'dke', '345')
