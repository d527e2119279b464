"""Deformable layers in any registered network, whether it has a slot for them or not."""

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn

from dk_detection.convert import to_deformable
from dk_detection.layers._base import RigidAtRest


class BackToRest(BaseModule):
    """Brings a network's deformable layers back to rest when MMEngine has drawn its weights.

    MMEngine asks a module's children for `init_weights`, those of a container of torch not. As the last child of the
    network this one is asked when all weights are drawn, and before the network's checkpoint is loaded. What a part of
    the network has loaded from a checkpoint of its own stays as it is.

    Args:
        network: Its parent.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = [network]  # a child of its child would be a circle

    def init_weights(self) -> None:
        history = getattr(self, "_params_init_info", {})  # MMEngine's, of each parameter
        for layer in self._network[0].modules():
            if isinstance(layer, RigidAtRest) and "PretrainedInit" not in str(history.get(layer.weight)):
                layer.init_weights()
        super().init_weights()


@MODELS.register_module(force=True)
def DkDeformable(network: str, exchange: dict | list[dict], **options) -> nn.Module:
    """A network of MMDetection in which some convolutions are exchanged.

    The result is the network itself, so that its parameters keep their names: a checkpoint of the rigid network, also
    one named in `init_cfg`, loads into the exchanged layers. A config that inherits a rigid model adds::

        backbone=dict(
            type='DkDeformable',
            network='MobileNetV2',
            exchange=dict(layer='mdconv', select='layer[67].*.depthwise_conv.conv'))

    Args:
        network: The `type` of the rigid network, "ResNet" for example.
        exchange: Arguments of `dk_detection.to_deformable`, `layer` (a token) and `select` and options of the layer; or
            several of them, carried out one after the other.
        options: Arguments of the rigid network.

    Returns:
        The network.

    Raises:
        ValueError, TypeError: What `to_deformable` raises.
    """
    module = MODELS.build(dict(type=network, **options))
    for arguments in [exchange] if isinstance(exchange, dict) else exchange:
        to_deformable(module, **arguments)
    module.back_to_rest = BackToRest(module)
    module.train()  # networks freeze stages here, and the new offset branches belong to them
    return module
