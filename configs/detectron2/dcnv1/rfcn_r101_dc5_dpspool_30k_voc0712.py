from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_votes

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel('rfcn_r101_dc5_30k_voc0712.py', KEYS)
deform_votes(model)
