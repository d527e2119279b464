from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from dk_detection.detectron2 import DkDeformable

dataloader, lr_multiplier, model, optimizer, train, tta = LazyConfig.load_rel(
    'mask-rcnn_r18_fpn_1k_deformed-shapes.py', ('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train', 'tta'))

model = L(DkDeformable)(
    network=model, exchange=[dict(layer='acu', select='backbone.bottom_up.res[345].*.conv[12]')])
