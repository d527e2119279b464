import pytest
import torch
from torch import nn

from dk_detection.backbones import ResNetDW
from tests.networks import RESNET_DW, deformed, exchange_in

EXPERTS = dict(layer="scc", num_experts=2)
# Millions of parameters: Deformable Kernels, Tables 1 and 2.
PARAMETERS = [
    (23.7, {}),
    (24.9, {"3x3": dict(layer="dk", scope_size=3)}),
    (25.0, {"3x3": "dk"}),
    (25.0, {"3x3": dict(layer="dk", scope_size=5)}),
    (25.4, {"3x3": dict(layer="dk", scope_size=9)}),
    (23.9, {"3x3": "gdk"}),
    (80.1, {"3x3": "gdk", "1x1": "gdk"}),
    (81.2, {"3x3": "dk", "1x1": "gdk"}),
    (42.5, {"3x3": EXPERTS, "1x1": EXPERTS}),
    (43.7, {"3x3": "dk", "1x1": EXPERTS}),
    (24.8, {"3x3 in c3-c5": "dconv"}),
    (26.1, {"3x3 in c2": "dk", "3x3 in c3-c5": "dkdconv"}),
]


@pytest.mark.parametrize(("millions", "layers"), PARAMETERS)
def test_parameters_are_those_of_the_paper(millions, layers):
    with torch.device("meta"):
        net = deformed(ResNetDW(1000), exchange_in(RESNET_DW, layers))
    # The paper rounds to 0.1, and some of its figures down.
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.06


def test_architecture_is_that_of_the_paper():
    """Deformable Kernels, Table 5."""
    with torch.device("meta"):
        net = ResNetDW()
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.out_channels) == ((7, 7), (2, 2), 64)
    for stage, blocks, width, out_channels in (
        (net.layer1, 3, 128, 256),
        (net.layer2, 4, 256, 512),
        (net.layer3, 6, 512, 1024),
        (net.layer4, 3, 1024, 2048),
    ):
        assert len(stage) == blocks
        for block in stage:
            assert (block.conv1.kernel_size, block.conv1.out_channels) == ((1, 1), width)
            assert (block.conv2.kernel_size, block.conv2.out_channels, block.conv2.groups) == ((3, 3), width, width)
            assert (block.conv3.kernel_size, block.conv3.out_channels) == ((1, 1), out_channels)
    assert net.out_channels == (256, 512, 1024, 2048)
    assert not any(isinstance(m, nn.Linear) for m in net.modules())


@pytest.mark.parametrize("blocks", [(3, 4, 6), (3, 4, 0, 3)])
def test_wrong_blocks(blocks):
    with pytest.raises(ValueError, match="ResNetDW: blocks must be four numbers of at least 1, got"):
        ResNetDW(blocks=blocks)
