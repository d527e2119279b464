from .._base_.coco import dataloader, tta
from .._base_.faster_rcnn_fpn import model
from .._base_.parts import deform_convs, use_r50
from .._base_.schedule_1x import lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = False
use_r50(model, dataloader, train)
model = deform_convs(model, 'dke', '345')
