"""Registers the layers of the table, the backbones, and networks in which convolutions are exchanged."""

import functools
import inspect

from mmengine.registry import MODELS, Registry
from torch import nn

from dk_detection.convert import exchanges, to_deformable
from dk_detection.layers.table import TABLE, Row
from dk_detection.mmengine.backbones import DkAlignedInceptionResNet, DkMobileNetV2, DkResNetDW, DkShallow9


def DkDeformable(network: str, exchange: dict | list[dict], *, registry: Registry = MODELS, **options) -> nn.Module:
    """A network in which some convolutions are exchanged.

    The result is the network itself, so that its parameters keep their names: a checkpoint of the rigid network, also
    one named in `init_cfg`, loads into the exchanged layers. A config that inherits a rigid model adds::

        backbone=dict(
            type='DkDeformable',
            network='MobileNetV2',
            exchange=[dict(layer='mdconv', select='layer[67].*.depthwise_conv.conv')])

    Args:
        network: The `type` of the rigid network, or of a whole model: "ResNet" is that of the framework whose config it
            is, "mmpretrain.ResNet" that of another one.
        exchange: `dict(layer=..., select=...)` with options of the layer, or several of them: see
            `dk_detection.convert.exchanges`.
        registry: Where the network is looked up if there is no default scope, which a config sets.
        options: Arguments of the rigid network.

    Returns:
        The network.

    Raises:
        ValueError, TypeError: What `exchanges` and `to_deformable` raise.
    """
    module = registry.build(dict(type=network, **options))
    for arguments in exchanges(exchange):
        to_deformable(module, **arguments)
    return module


def _builder(row: Row):
    """The layer's constructor, which also takes the names that `offset_groups` has in mmcv, now and before."""
    has_offset_groups = "offset_groups" in inspect.signature(row.layer).parameters

    @functools.wraps(row.layer, updated=())
    def build(*args, **kwargs):
        for name in ("deform_groups", "deformable_groups"):
            if name in kwargs and "offset_groups" in kwargs:
                raise TypeError(f"{row.name}: {name} is another name of offset_groups; give one of them")
            if name in kwargs:
                number = kwargs.pop(name)
                if has_offset_groups:
                    kwargs["offset_groups"] = number
                elif number != 1:
                    raise TypeError(f"{row.name}: {name} must be 1, as this layer has no offset groups, got {number}")
        return row.layer(*args, **kwargs)

    return build


def register(registry: Registry) -> None:
    """Makes `type='DkModulatedDeformConv2d'` and its like known in a registry of models. May be called again.

    What is in MMEngine's own is found from every framework, also by mmcv, which builds convolutions from there.
    """
    modules = {row.name: _builder(row) for row in TABLE}
    backbones = (DkAlignedInceptionResNet, DkResNetDW, DkMobileNetV2, DkShallow9)
    modules |= {backbone.__name__: backbone for backbone in backbones}
    modules["DkDeformable"] = functools.partial(DkDeformable, registry=registry)
    for name, module in modules.items():
        registry.register_module(name=name, module=module, force=True)
