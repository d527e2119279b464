"""Deformable layers in any finished network of Detectron2."""

import logging
import os
from collections.abc import Mapping, Sequence

from detectron2.config import configurable
from detectron2.layers import Conv2d
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from dk_detection import convert
from dk_detection.convert import exchanges
from dk_detection.detectron2.short_names import accept_short_names


def to_deformable(module: nn.Module, layer: type[nn.Conv2d] | str, *, select, **layer_options) -> list[str]:
    """`dk_detection.to_deformable` for networks of Detectron2, whose convolutions hold their normalisation.

    It stays where it is, so that parameters keep their names: `conv2.weight`, `conv2.norm.weight`; new are those of
    the branches, such as `conv2.conv_offset.weight`.

    Args:
        module, layer, select, layer_options: As there.

    Returns:
        The dotted names at which a layer was exchanged.

    Raises:
        ValueError, TypeError: As there.
    """
    before = dict(module.named_modules(remove_duplicate=False))
    held = {conv: (conv.norm, conv.activation) for conv in before.values() if isinstance(conv, Conv2d)}
    for conv in held:
        conv.norm = conv.activation = None
    try:
        names = convert.to_deformable(module, layer, select=select, **layer_options)
    finally:
        for conv, (norm, activation) in held.items():
            conv.norm, conv.activation = norm, activation

    exchanged = {before[name]: module.get_submodule(name) for name in names}
    for conv, new in exchanged.items():
        if conv in held:
            new.norm, new.activation = held[conv]
            new.register_forward_hook(_norm_and_activation)
    # FPN keeps its convolutions in plain lists besides, and runs those.
    for parent in module.modules():
        for value in vars(parent).values():
            if isinstance(value, list):
                value[:] = [exchanged.get(item, item) if isinstance(item, nn.Module) else item for item in value]
    return names


def _norm_and_activation(layer, args, output):
    if layer.norm is not None:
        output = layer.norm(output)
    return output if layer.activation is None else layer.activation(output)


def _from_config(cfg):
    if cfg.SOLVER.DK_LR_FACTORS and os.environ.get("DETECTRON2_ENV_MODULE") == "dk_detection.detectron2.env":
        logging.getLogger(__name__).warning(
            "SOLVER.DK_LR_FACTORS %s: Detectron2's train_net.py gives all parameters of a YAML config one learning "
            "rate; the tools/train_net.py of dk_detection heeds the factors, and so do LazyConfigs.",
            cfg.SOLVER.DK_LR_FACTORS,
        )
    return {"network": META_ARCH_REGISTRY.get(cfg.MODEL.DK.NETWORK)(cfg), "exchange": cfg.MODEL.DK.EXCHANGE}


@META_ARCH_REGISTRY.register()
@configurable(from_config=_from_config)
def DkDeformable(network: nn.Module, exchange: Mapping | Sequence[Mapping]) -> nn.Module:
    """A network in which some convolutions are exchanged.

    The result is the network itself, so that its parameters keep their names, and a checkpoint of the rigid network
    loads into the exchanged layers. In YAML it is a META_ARCHITECTURE, with the settings of MODEL.DK; in a LazyConfig::

        model = L(DkDeformable)(
            network=model, exchange=[dict(layer="mdconv", select="backbone.bottom_up.res[345].*.conv2")])

    Args:
        network: The rigid network, best the whole detector: files of pretrained backbones have short names, which only
            the whole detector sees.
        exchange: `dict(layer=..., select=...)` with options of the layer, or several of them: see
            `dk_detection.convert.exchanges`.

    Returns:
        The network.

    Raises:
        ValueError, TypeError: What `exchanges` and `to_deformable` raise.
    """
    accept_short_names(network)  # whole names are translated by what `to_deformable` registers, after it
    for arguments in exchanges(exchange):
        to_deformable(network, **arguments)
    return network
