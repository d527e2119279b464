"""Deformable layers in any registered network, whether it has a slot for them or not."""

from mmdet.registry import MODELS
from torch import nn

from dk_detection.convert import exchanges, to_deformable


@MODELS.register_module(force=True)
def DkDeformable(network: str, exchange: dict | list[dict], **options) -> nn.Module:
    """A network of MMDetection in which some convolutions are exchanged.

    The result is the network itself, so that its parameters keep their names: a checkpoint of the rigid network, also
    one named in `init_cfg`, loads into the exchanged layers. A config that inherits a rigid model adds::

        backbone=dict(
            type='DkDeformable',
            network='MobileNetV2',
            exchange=[dict(layer='mdconv', select='layer[67].*.depthwise_conv.conv')])

    Args:
        network: The `type` of the rigid network, "ResNet" for example, or of a whole detector.
        exchange: `dict(layer=..., select=...)` with options of the layer, or several of them: see
            `dk_detection.convert.exchanges`.
        options: Arguments of the rigid network.

    Returns:
        The network.

    Raises:
        ValueError, TypeError: What `exchanges` and `to_deformable` raise.
    """
    module = MODELS.build(dict(type=network, **options))
    for arguments in exchanges(exchange):
        to_deformable(module, **arguments)
    return module
