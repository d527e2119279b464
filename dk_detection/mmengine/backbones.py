"""The backbones of Deformable Kernels, by name."""

import copy

from mmengine.model import BaseModule

from dk_detection.backbones import MobileNetV2, ResNetDW


class _WithInitCfg:
    """Gives a network `init_cfg`. The bases are this, the network, and BaseModule, whose constructor the network calls.

    Without `init_cfg` the weights are those that torchvision's constructor draws.
    """

    def __init__(self, *args, init_cfg: dict | list[dict] | None = None, **options) -> None:
        super().__init__(*args, **options)
        self.init_cfg = copy.deepcopy(init_cfg)


class DkResNetDW(_WithInitCfg, ResNetDW, BaseModule):
    """`dk_detection.backbones.ResNetDW`, and `init_cfg`."""


class DkMobileNetV2(_WithInitCfg, MobileNetV2, BaseModule):
    """`dk_detection.backbones.MobileNetV2`, and `init_cfg`; "torchvision://mobilenet_v2" is a checkpoint that fits."""
