# A narrow class-aware RPN for objects of 14 to 60 pixels, at half the strides: conv4 and conv5 at 8.
from detectron2.config import LazyConfig

from .._base_.parts import KEYS, class_aware_rpn

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'rfcn_r50_dc5_1k_deformed-shapes.py', KEYS)
model = class_aware_rpn(model, 128)
model.test_topk_candidates = 200
