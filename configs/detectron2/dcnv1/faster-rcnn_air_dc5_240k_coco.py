# Faster R-CNN as in Deformable ConvNets (2017), Sections 2.3 and 4.1: proposals from conv4; conv5 at stride 16, dilated
# and reduced to 256 channels by a 1x1 convolution, pooled to 7x7; two fully connected layers of 1024.
from detectron2.config import LazyConfig

from .._base_.parts import as_in_dcnv1, use_air
from .._base_.schedule_240k import lr_multiplier, optimizer, train

dataloader, model, tta = LazyConfig.load_rel(
    '../dcnv2/faster-rcnn_r50_dc5_16e_coco.py', ('dataloader', 'model', 'tta'))
as_in_dcnv1(model, dataloader)
model = use_air(model, dataloader, train)
