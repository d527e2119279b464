# The detectors of Deformable Kernels, Tables 3 and 4.
import os

import torchvision
from detectron2.config import LazyCall as L

from dk_detection.detectron2 import DkDeformable, DkMobileNetV2, DkResNetDW

from .faster_rcnn_fpn import model as faster_rcnn
from .parts import set_pixels

# The convolutions of MobileNet-V2's blocks, of which the first has no expansion.
_FEATURES = 'backbone.bottom_up.features.'
DEPTHWISE_C2 = [_FEATURES + name for name in ('1.conv.0.0', '[23].conv.1.0')]
DEPTHWISE_C3_C5 = [_FEATURES + name for name in ('[4-9].conv.1.0', '1?.conv.1.0')]
DEPTHWISE = DEPTHWISE_C2 + DEPTHWISE_C3_C5
POINTWISE = [
    _FEATURES + name for name in ('1.conv.1', '[2-9].conv.0.0', '1?.conv.0.0', '*.conv.2', '18.0')]
BLOCKS = DEPTHWISE + POINTWISE


def make(backbone, dataloader, optimizer, factor):
    """Faster R-CNN with FPN on one of our backbones.

    Only the stem is frozen: deformable kernels come out of rigid weights at rest, and those of conv2 learn as well.
    Weight decay, and the rate of what makes the offsets as a part of the network's: Section 4. The routing of
    conditional convolutions makes no offsets and learns at the full rate.
    """
    faster_rcnn.backbone.update(
        bottom_up=L(backbone)(frozen_stages=0, norm_eval=True), in_features=['res2', 'res3', 'res4', 'res5'])
    set_pixels(faster_rcnn, dataloader, 'RGB', [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    dataloader.train.mapper.use_instance_mask = False
    optimizer.weight_decay = 4e-5
    optimizer.params.lr_factor_func.factors = {'kernel_offset': factor, 'conv_offset': factor}
    # Nothing is exchanged here; but the whole detector then understands the short names of the backbone's weights.
    return L(DkDeformable)(network=faster_rcnn, exchange=[])


def r50_dw(dataloader, optimizer, train):
    """Weights of ResNet-50-DW, trained on ImageNet, are published nowhere; configs/imagenet makes them. Those of the
    rigid one fit all of its deformable twins. The environment variable DK_R50_DW_CHECKPOINT says where yours lie."""
    checkpoint = os.environ.get('DK_R50_DW_CHECKPOINT', 'work_dirs/r50-dw_90e_imagenet/backbone.pth')
    train.init_checkpoint = f'{checkpoint}?matching_heuristics=True'
    return make(DkResNetDW, dataloader, optimizer, 0.01)


def mobilenet_v2(dataloader, optimizer, train):
    """torchvision's weights, or those of the file that the environment variable DK_MOBILENET_V2_CHECKPOINT names."""
    checkpoint = os.environ.get(
        'DK_MOBILENET_V2_CHECKPOINT', torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url)
    train.init_checkpoint = f'{checkpoint}?matching_heuristics=True'
    return make(DkMobileNetV2, dataloader, optimizer, 0.1)
