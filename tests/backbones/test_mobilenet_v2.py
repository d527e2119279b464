import pytest
import torch
import torchvision

from dk_detection.backbones import MobileNetV2

EXPERTS = dict(layer="scc", num_experts=8)
# Millions of parameters: Deformable Kernels, Tables 1 and 2.
PARAMETERS = [
    (3.5, {}),
    (3.7, dict(conv3x3="gdk")),
    (10.1, dict(conv3x3="gdk", conv1x1="gdk")),
    (4.7, dict(conv3x3="dk")),
    (11.1, dict(conv3x3="dk", conv1x1="gdk")),
    (19.0, dict(conv3x3=EXPERTS, conv1x1=EXPERTS)),
    (19.7, dict(conv3x3="dk", conv1x1=EXPERTS)),
    (4.6, dict(conv3x3=dict(layer="dconv", stages="c3-c5"))),
    (5.8, dict(conv3x3=[dict(layer="dk", stages="c2"), dict(layer="dkdconv", stages="c3-c5")])),
]


@pytest.mark.parametrize(("millions", "layers"), PARAMETERS)
def test_parameters_are_those_of_the_paper(millions, layers):
    with torch.device("meta"):
        net = MobileNetV2(1000, **layers)
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
