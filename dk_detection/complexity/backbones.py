"""Classification backbones by name."""

from collections.abc import Sequence

import torch
from torch import nn
from torchvision import models

from dk_detection.backbones import AlignedInceptionResNet, MobileNetV2, ResNetDW
from dk_detection.complexity.counting import Part, count_network
from dk_detection.convert import exchanges, fold_scopes, to_deformable
from dk_detection.errors import UserError

BACKBONES = {
    "resnet50-dw": ResNetDW,
    "mobilenet-v2": MobileNetV2,
    "aligned-inception-resnet": AlignedInceptionResNet,
}


def count_backbone(name: str, shape: tuple[int, int] = (224, 224), exchange: Sequence[dict] = ()) -> list[Part]:
    """Counts a classifier of 1000 classes.

    Args:
        name: A name in `BACKBONES`, or a classification model of torchvision, such as "resnet101".
        shape: (H, W) of the image.
        exchange: Which layers stand where, in the grammar of `dk_detection.convert.exchanges`.

    Returns:
        A part for each child of the network.

    Raises:
        UserError: There is no such network, it does not take the layers, or the image is too small for it.
    """
    try:
        return count_network(build_backbone(name, exchange), shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be counted: {error}") from error


def build_backbone(name: str, exchange: Sequence[dict] = ()) -> nn.Module:
    """The classifier that `count_backbone` counts, folded for inference, on the meta device.

    Raises:
        UserError: There is no such network.
        TypeError, ValueError: `exchanges` or `to_deformable` raises it.
    """
    if name not in BACKBONES and name not in models.list_models(module=models):
        raise UserError(
            f"there is no backbone {name!r}; there are {', '.join(BACKBONES)} and torchvision's classification models"
        )
    with torch.device("meta"):
        network = BACKBONES[name](num_classes=1000) if name in BACKBONES else models.get_model(name, weights=None)
        for arguments in exchanges(exchange):
            to_deformable(network, **arguments)
    return fold_scopes(network)
