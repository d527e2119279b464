"""Networks as tests of conversion and of checkpoints need them."""

from paper_tables import PLACES
from torch import nn

from dk_detection.convert import exchanges, to_deformable

# The convolutions of the blocks in dk_detection.backbones, of all stages and of some.
RESNET_DW = {
    **PLACES["resnet50-dw"],
    "3x3 in c5": "layer4.*.conv2",
    "1x1 in c3": "layer2.*.conv[13]",
}
MOBILENET_V2 = {
    **PLACES["mobilenet-v2"],
    "3x3 in c5": "features.1[4-7].conv.1.0",
    "1x1 in c3": ["features.[456].conv.0.0", "features.[456].conv.2"],
}
AIR = {
    "3x3": "layer*.conv?",
    "3x3 in c2": "layer1.*.conv?",
    "3x3 in c3-c5": "layer[234].*.conv?",
    "1x1": ["layer*.reduce?", "layer*.expand"],
    "3x3 in c5": "layer4.*.conv?",
    "1x1 in c3": ["layer2.*.reduce?", "layer2.*.expand"],
}


# Options with which a layer at rest is exactly the rigid one, where it is not so by itself: kernels that do not smooth.
EXACT = {"dke": {"alpha": 100.0}}


def exchange_in(places: dict, layers: dict) -> list[dict]:
    """An `exchange` of what stands in places of a network: {"3x3": "dk"} or {"3x3": dict(layer="dk", scope_size=5)}."""
    return [
        dict(layer, select=places[place]) if isinstance(layer, dict) else dict(layer=layer, select=places[place])
        for place, layer in layers.items()
    ]


def deformed(net: nn.Module, exchange: list[dict]) -> nn.Module:
    """The network after an exchange."""
    for arguments in exchanges(exchange):
        to_deformable(net, **arguments)
    return net


def settled(net: nn.Module) -> nn.Module:
    """A network as after training: no statistic of a batch normalisation is that of the start."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
    net.eval()  # mmdet's ResNet returns None here
    return net
