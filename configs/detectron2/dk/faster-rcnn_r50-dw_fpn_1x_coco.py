from .._base_.coco import dataloader, tta
from .._base_.dk import r50_dw
from .._base_.schedule_1x import lr_multiplier, optimizer, train

model = r50_dw(dataloader, optimizer, train)
