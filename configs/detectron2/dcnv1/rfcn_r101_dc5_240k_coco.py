# R-FCN (2016) as in Deformable ConvNets (2017), Section 4.1: proposals from conv4; conv5 at stride 16, dilated, reduced
# to 1024 channels by a 1x1 convolution; score and box maps of 7x7 bins, 128 RoIs an image, shorter sides of 600 pixels.
from detectron2.config import LazyConfig

from .._base_.parts import as_in_dcnv1, use_r101, vote
from .._base_.schedule_240k import lr_multiplier, optimizer, train

dataloader, model, tta = LazyConfig.load_rel(
    '../dcnv2/faster-rcnn_r50_dc5_16e_coco.py', ('dataloader', 'model', 'tta'))
use_r101(model, dataloader, train, dilated=True)
model.backbone.out_channels = 1024
model.backbone.bottom_up.freeze_at = 2
as_in_dcnv1(model, dataloader)
vote(model, 1024, 7)
