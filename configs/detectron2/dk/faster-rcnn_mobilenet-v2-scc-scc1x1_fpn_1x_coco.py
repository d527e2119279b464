from detectron2.config import LazyConfig

from .._base_.parts import KEYS

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load_rel(
    'faster-rcnn_mobilenet-v2_fpn_1x_coco.py', KEYS)
model.network.backbone.bottom_up.update(
    conv3x3=dict(layer='scc', num_experts=8), conv1x1=dict(layer='scc', num_experts=8))
