"""What the backbones do with their stages, and with deformable layers in all kinds of places."""

import copy

import pytest
import torch
from torch import nn

from dk_detection.backbones import AlignedInceptionResNet, MobileNetV2, ResNetDW
from dk_detection.layers._base import ZeroConv2d
from tests.networks import AIR, MOBILENET_V2, RESNET_DW, deformed, exchange_in, settled

NETWORKS = {
    "resnet_dw": (ResNetDW, dict(blocks=(2, 1, 1, 1))),
    "mobilenet_v2": (MobileNetV2, dict(width_mult=0.25)),
    "aligned_inception_resnet": (AlignedInceptionResNet, dict(blocks=(1, 1, 1, 1))),
}
NAMES = {ResNetDW: RESNET_DW, MobileNetV2: MOBILENET_V2, AlignedInceptionResNet: AIR}
each = pytest.mark.parametrize(("network", "options"), NETWORKS.values(), ids=NETWORKS.keys())
EXPERTS = dict(layer="scc", num_experts=3)
PLACES = {
    "rigid": {},
    "dk, gdk": {"3x3": "dk", "1x1": "gdk"},
    "dk with dconv": {"3x3 in c2": "dk", "3x3 in c3-c5": dict(layer="dkdconv", scope_size=5)},
    "scc": {"3x3": EXPERTS, "1x1": EXPERTS},
    "mdconv": {"3x3 in c5": "mdconv"},
}
places = pytest.mark.parametrize("layers", PLACES.values(), ids=PLACES.keys())


def build(network, options, layers):
    return deformed(network(**options), exchange_in(NAMES[network], layers))


def branches(net: nn.Module) -> list[ZeroConv2d]:
    return [m for m in net.modules() if isinstance(m, ZeroConv2d)]


@each
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_features(network, options, size):
    net = network(**options)
    assert net.out_strides == (4, 8, 16, 32)
    expected = [
        (2, channels, *(-(-side // stride) for side in size))
        for channels, stride in zip(net.out_channels, net.out_strides, strict=True)
    ]
    assert [tuple(x.shape) for x in net(torch.rand(2, 3, *size))] == expected


@each
@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (3,)])
def test_nothing_is_built_behind_the_last_feature(network, options, out_indices):
    whole = settled(network(**options))
    net = network(**options, out_indices=out_indices).eval()
    net.load_state_dict(whole.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 96)
    features = net(x)
    for ours, expected in zip(features, [whole(x)[i] for i in out_indices], strict=True):
        assert torch.equal(ours, expected)
    assert net.out_channels == tuple(whole.out_channels[i] for i in out_indices)
    assert net.out_strides == tuple(whole.out_strides[i] for i in out_indices)
    sum(feature.sum() for feature in features).backward()
    assert all(p.grad is not None for p in net.parameters())


@each
def test_classifier(network, options):
    net = settled(network(7, **options, out_indices=(1, 2)))
    backbone = network(**options).eval()
    head, name = (net.classifier, "classifier") if network is MobileNetV2 else (net.fc, "fc")
    left_over = backbone.load_state_dict(net.state_dict(), strict=False)
    assert {key.split(".")[0] for key in left_over.unexpected_keys} == {name}
    assert not left_over.missing_keys
    x = torch.rand(2, 3, 64, 96)
    assert net(x).shape == (2, 7)
    torch.testing.assert_close(net(x), head(backbone(x)[-1].mean((2, 3))), rtol=1e-5, atol=1e-6)
    for ours, expected in zip(net.forward_features(x), backbone(x)[1:3], strict=True):
        assert torch.equal(ours, expected)


@each
@places
def test_rigid_checkpoint_gives_the_rigid_features(network, options, layers):
    """To 1e-5 of the largest value: float32 over up to fifty layers."""
    rigid = settled(network(**options))
    net = build(network, options, layers).eval()
    net.load_state_dict(rigid.state_dict(), strict=True)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(net(x), rigid(x), strict=True):
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@each
@places
def test_a_step_moves_all_that_steers(network, options, layers):
    net = build(network, options, layers)
    assert bool(branches(net)) == bool(layers)
    assert all(p.eq(0).all() for branch in branches(net) for p in branch.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sum((feature * torch.randn(feature.shape)).mean() for feature in net(torch.randn(2, 3, 64, 96))).backward()
    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
    assert all(branch.weight.ne(0).any() for branch in branches(net))
    assert all(p.isfinite().all() for p in net.parameters())


@each
@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(network, options, frozen):
    net = build(network, {**options, "frozen_stages": frozen}, {"3x3": "dk"}).train()
    stopped = {m for part in net._parts()[: frozen + 1] for module in part for m in module.modules()}
    assert all(m.training == (m not in stopped) for m in net.modules())
    parameters = {p for m in stopped for p in m.parameters(recurse=False)}
    assert all(p.requires_grad == (p not in parameters) for p in net.parameters())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net(torch.rand(2, 3, 64, 96))
    assert all(norm.num_batches_tracked == (norm not in stopped) for norm in norms)
    assert len(parameters) > len(branches(net)) or frozen < 4


@each
def test_norm_eval(network, options):
    net = network(**options, norm_eval=True)
    assert net.train() is net
    assert net.training
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m.training for m in net.eval().modules())


@each
@places
def test_copies_and_autocast(network, options, layers):
    net = build(network, options, layers)
    for branch in branches(net):
        nn.init.normal_(branch.weight, std=0.01)
    net.eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(copy.deepcopy(net)(x), net(x), strict=True):
            assert torch.equal(ours, expected)
    with torch.autocast("cpu", torch.bfloat16):
        features = net(x)
    assert all(feature.dtype == torch.bfloat16 and feature.isfinite().all() for feature in features)


WRONG = {
    "no feature": (dict(out_indices=()), r"out_indices must be of 0 to 3 and ascending, got \(\)"),
    "order": (dict(out_indices=(2, 1)), "out_indices must be of 0 to 3 and ascending"),
    "index": (dict(out_indices=(4,)), "out_indices must be of 0 to 3"),
    "classes": (dict(num_classes=0), "num_classes must be None or at least 1, got 0"),
    "frozen": (dict(frozen_stages=5), "frozen_stages must be -1 to 4, the number of stages, got 5"),
    "frozen, cut": (dict(frozen_stages=3, out_indices=(1,)), "frozen_stages must be -1 to 2"),
}


@each
@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(network, options, wrong, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        network(**options, **wrong)
