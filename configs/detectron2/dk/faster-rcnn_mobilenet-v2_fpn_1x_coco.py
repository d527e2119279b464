from .._base_.coco import dataloader, tta
from .._base_.dk import mobilenet_v2
from .._base_.schedule_1x import lr_multiplier, optimizer, train

model = mobilenet_v2(dataloader, optimizer, train)
