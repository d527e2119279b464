from detectron2.config import LazyConfig

from .._base_.parts import KEYS, deform_votes

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel('rfcn_air_dc5_240k_coco.py', KEYS)
model.exchange = [dict(layer='dconv', select='backbone.bottom_up.layer4.*.conv?')]
deform_votes(model)
