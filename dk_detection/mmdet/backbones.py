"""The backbones of Deformable Kernels, by name."""

import copy

from mmdet.registry import MODELS
from mmengine.model import BaseModule, PretrainedInit, initialize

from dk_detection.backbones import MobileNetV2, ResNetDW
from dk_detection.layers._base import RigidAtRest


class _WithInitCfg:
    """Gives a network `init_cfg`. The bases are this, the network, and BaseModule, whose constructor the network calls.

    Without `init_cfg` the weights are those that torchvision's constructor draws.
    """

    def __init__(self, *args, init_cfg: dict | list[dict] | None = None, **options) -> None:
        super().__init__(*args, **options)
        self.init_cfg = copy.deepcopy(init_cfg)

    def init_weights(self) -> None:
        """As BaseModule's, which by itself would not find layers inside torchvision's containers."""
        if not self.is_init:
            everything = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
            checkpoints = [cfg for cfg in everything if cfg["type"] in ("Pretrained", PretrainedInit)]
            initialize(self, [cfg for cfg in everything if cfg not in checkpoints])
            for layer in self.modules():
                if isinstance(layer, RigidAtRest):
                    layer.init_weights()
            self.init_cfg = checkpoints
        super().init_weights()


@MODELS.register_module(force=True)
class DkResNetDW(_WithInitCfg, ResNetDW, BaseModule):
    """`dk_detection.backbones.ResNetDW`, and `init_cfg`. A checkpoint of the rigid network fits every other."""


@MODELS.register_module(force=True)
class DkMobileNetV2(_WithInitCfg, MobileNetV2, BaseModule):
    """`dk_detection.backbones.MobileNetV2`, and `init_cfg`; "torchvision://mobilenet_v2" is a checkpoint that fits."""
