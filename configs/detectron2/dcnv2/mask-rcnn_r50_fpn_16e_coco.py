from detectron2 import model_zoo

from .._base_.coco import dataloader, tta
from .._base_.parts import use_r50
from .._base_.schedule_16e import lr_multiplier, optimizer, train

model = model_zoo.get_config('common/models/mask_rcnn_fpn.py').model
use_r50(model, dataloader, train)

# Samples of a bin and number of proposals as in Deformable ConvNets v2, Sections 3.2 and 5.1.
model.proposal_generator.post_nms_topk = (2000, 1000)
model.roi_heads.box_pooler.sampling_ratio = model.roi_heads.mask_pooler.sampling_ratio = 2
