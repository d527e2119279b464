# A Mask R-CNN for objects of 14 to 60 pixels that learns from scratch on two CPU cores within ten minutes: narrow, with
# few proposals, and with normalisations wherever no pretrained weights stand in for them.
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from dk_detection.detectron2 import LearningRateFactors

from .._base_.deformed_shapes import dataloader, tta
from .._base_.parts import set_pixels

model = model_zoo.get_config('common/models/mask_rcnn_fpn.py').model
set_pixels(model, dataloader, 'RGB', [128.0] * 3, [50.0] * 3)

model.backbone.bottom_up.stem.update(out_channels=32, norm='BN')
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=2,
        stride_per_block=[stride, 1],
        in_channels=in_channels,
        out_channels=out_channels,
        norm='BN') for stride, in_channels, out_channels in ((1, 32, 32), (2, 32, 64), (2, 64, 128), (2, 128, 256))
]
model.backbone.update(out_channels=64, norm='BN', top_block=None)

model.proposal_generator.in_features = ['p2', 'p3', 'p4', 'p5']
model.proposal_generator.head.in_channels = 64
model.proposal_generator.anchor_generator.update(
    sizes=[[16], [32], [64], [128]], aspect_ratios=[0.6, 1.0, 1.67], strides=[4, 8, 16, 32])
model.proposal_generator.update(batch_size_per_image=64, pre_nms_topk=(200, 200), post_nms_topk=(100, 100))

heads = model.roi_heads
heads.update(num_classes=6, batch_size_per_image=48, positive_fraction=0.33)
heads.box_in_features = heads.mask_in_features = ['p2', 'p3', 'p4']
for pooler in (heads.box_pooler, heads.mask_pooler):
    pooler.update(scales=(1 / 4, 1 / 8, 1 / 16), sampling_ratio=1, canonical_box_size=28, canonical_level=2)
heads.box_head.input_shape.channels = heads.mask_head.input_shape.channels = 64
heads.box_head.fc_dims = [256, 256]
heads.box_predictor.input_shape.channels = 256
heads.box_predictor.update(cls_agnostic_bbox_reg=True, test_topk_per_image=50)
heads.mask_head.conv_dims = [64, 64, 64]

optimizer = model_zoo.get_config('common/optim.py').AdamW
optimizer.update(lr=0.001, weight_decay=0.05)
optimizer.params.lr_factor_func = L(LearningRateFactors)(factors={'conv_offset': 0.1, 'kernel_offset': 0.1})
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_factor=0.05,
    warmup_length=0.1,
    warmup_method='linear',
    rescale_interval=True)

train = model_zoo.get_config('common/train.py').train
train.update(
    max_iter=1000, eval_period=1000, seed=0, device='cuda' if torch.cuda.is_available() else 'cpu')
train.checkpointer.update(period=100, max_to_keep=2)
