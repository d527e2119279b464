from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_last_convs

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'class-aware-rpn_r101_dc5_30k_voc0712.py', KEYS)
model = deform_last_convs(model, 'dconv', 1)
