import pytest
import torch
import torchvision

from dk_detection.backbones import MobileNetV2
from tests.networks import MOBILENET_V2, deformed, exchange_in

EXPERTS = dict(layer="scc", num_experts=8)
# Millions of parameters: Deformable Kernels, Tables 1 and 2.
PARAMETERS = [
    (3.5, {}),
    (3.7, {"3x3": "gdk"}),
    (10.1, {"3x3": "gdk", "1x1": "gdk"}),
    (4.7, {"3x3": "dk"}),
    (11.1, {"3x3": "dk", "1x1": "gdk"}),
    (19.0, {"3x3": EXPERTS, "1x1": EXPERTS}),
    (19.7, {"3x3": "dk", "1x1": EXPERTS}),
    (4.6, {"3x3 in c3-c5": "dconv"}),
    (5.8, {"3x3 in c2": "dk", "3x3 in c3-c5": "dkdconv"}),
]


@pytest.mark.parametrize(("millions", "layers"), PARAMETERS)
def test_parameters_are_those_of_the_paper(millions, layers):
    with torch.device("meta"):
        net = deformed(MobileNetV2(1000), exchange_in(MOBILENET_V2, layers))
    # The paper rounds to 0.1.
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.06


def test_torchvision_checkpoint():
    theirs = torchvision.models.mobilenet_v2().eval()
    net = MobileNetV2(1000).eval()
    net.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(net(image), theirs(image))
        last = {}  # map of each height
        x = image
        for module in theirs.features:
            x = module(x)
            last[x.shape[2]] = x
        for ours, height in zip(net.forward_features(image), (16, 8, 4, 2), strict=True):
            assert torch.equal(ours, last[height])
    assert net.out_channels == (24, 32, 96, 1280)
