from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_convs

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'class-aware-rpn_r50_dc5_1k_deformed-shapes.py', KEYS)
model = deform_convs(model, 'dconv', '5')
