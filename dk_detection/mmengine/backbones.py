"""The backbones of the papers, by name."""

import copy

from mmengine.model import BaseModule

from dk_detection.backbones import AlignedInceptionResNet, MobileNetV2, ResNetDW, Shallow9


class _WithInitCfg:
    """Gives a network `init_cfg`. The bases are this, the network, and BaseModule, whose constructor the network calls.

    Without `init_cfg` the weights are those that torchvision's constructor draws. A checkpoint of a classifier of
    MMPretrain's is one of its backbone, too.
    """

    def __init__(self, *args, init_cfg: dict | list[dict] | None = None, **options) -> None:
        super().__init__(*args, **options)
        self.init_cfg = copy.deepcopy(init_cfg)
        self.register_load_state_dict_pre_hook(_take_out_of_classifier)


def _take_out_of_classifier(module, state_dict, prefix, *args) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}backbone.")]:
        state_dict[prefix + name.removeprefix(f"{prefix}backbone.")] = state_dict.pop(name)


class DkResNetDW(_WithInitCfg, ResNetDW, BaseModule):
    """`dk_detection.backbones.ResNetDW`, and `init_cfg`."""


class DkAlignedInceptionResNet(_WithInitCfg, AlignedInceptionResNet, BaseModule):
    """`dk_detection.backbones.AlignedInceptionResNet`, and `init_cfg`."""


class DkMobileNetV2(_WithInitCfg, MobileNetV2, BaseModule):
    """`dk_detection.backbones.MobileNetV2`, and `init_cfg`; "torchvision://mobilenet_v2" is a checkpoint that fits."""


class DkShallow9(_WithInitCfg, Shallow9, BaseModule):
    """`dk_detection.backbones.Shallow9`, and `init_cfg`; without it the weights are those that PyTorch draws."""
