from .._base_.coco import dataloader, tta
from .._base_.faster_rcnn_fpn import model
from .._base_.parts import use_r18
from .._base_.schedule_1x import lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = False
use_r18(model, dataloader, train)
