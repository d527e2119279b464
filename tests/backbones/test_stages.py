"""What both backbones do with their stages and places."""

import copy

import pytest
import torch
from torch import nn

from dk_detection.backbones import MobileNetV2, ResNetDW
from dk_detection.layers import LocalDeformKernel2d, ModulatedDeformConv2d
from dk_detection.layers._base import RigidAtRest, ZeroConv2d
from tests.networks import settled

NETWORKS = {
    "resnet_dw": (ResNetDW, dict(blocks=(2, 1, 1, 1))),
    "mobilenet_v2": (MobileNetV2, dict(width_mult=0.25)),
}
both = pytest.mark.parametrize(("network", "options"), NETWORKS.values(), ids=NETWORKS.keys())
EXPERTS = dict(layer="scc", num_experts=3)
PLACES = {
    "rigid": {},
    "dk, gdk": dict(conv3x3="dk", conv1x1="gdk"),
    "dk with dconv": dict(conv3x3=[dict(layer="dk", stages="c2"), dict(layer="dkdconv", stages="c3-c5", scope_size=5)]),
    "scc": dict(conv3x3=EXPERTS, conv1x1=EXPERTS),
    "mdconv": dict(conv3x3=dict(layer="mdconv", stages="c5")),
}
places = pytest.mark.parametrize("layers", PLACES.values(), ids=PLACES.keys())


def branches(net: nn.Module) -> list[ZeroConv2d]:
    return [m for m in net.modules() if isinstance(m, ZeroConv2d)]


@both
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_features(network, options, size):
    net = network(**options)
    assert net.out_strides == (4, 8, 16, 32)
    expected = [
        (2, channels, *(-(-side // stride) for side in size))
        for channels, stride in zip(net.out_channels, net.out_strides, strict=True)
    ]
    assert [tuple(x.shape) for x in net(torch.rand(2, 3, *size))] == expected


@both
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


@both
def test_classifier(network, options):
    net = settled(network(7, **options, out_indices=(1, 2)))
    backbone = network(**options).eval()
    head, name = (net.fc, "fc") if network is ResNetDW else (net.classifier, "classifier")
    left_over = backbone.load_state_dict(net.state_dict(), strict=False)
    assert {key.split(".")[0] for key in left_over.unexpected_keys} == {name}
    assert not left_over.missing_keys
    x = torch.rand(2, 3, 64, 96)
    assert net(x).shape == (2, 7)
    torch.testing.assert_close(net(x), head(backbone(x)[-1].mean((2, 3))), rtol=1e-5, atol=1e-6)
    for ours, expected in zip(net.forward_features(x), backbone(x)[1:3], strict=True):
        assert torch.equal(ours, expected)


@both
@places
def test_rigid_checkpoint_gives_the_rigid_features(network, options, layers):
    """To 1e-5 of the largest value: float32 over up to fifty layers."""
    rigid = settled(network(**options))
    net = network(**options, **layers).eval()
    net.load_state_dict(rigid.state_dict(), strict=True)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(net(x), rigid(x), strict=True):
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@both
@places
def test_a_step_moves_all_that_steers(network, options, layers):
    net = network(**options, **layers)
    assert bool(branches(net)) == bool(layers)
    assert all(p.eq(0).all() for branch in branches(net) for p in branch.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sum((feature * torch.randn(feature.shape)).mean() for feature in net(torch.randn(2, 3, 64, 96))).backward()
    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
    assert all(branch.weight.ne(0).any() for branch in branches(net))
    assert all(p.isfinite().all() for p in net.parameters())


def convolutions(network, stages: str | None, size: tuple[int, int]) -> list[str]:
    """The places of a size in some stages, read off torchvision's names."""
    first, last = (int(stages[1]), int(stages[-1])) if stages else (2, 5)
    names = [name for name, m in network().named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == size]
    if network is ResNetDW:
        return [name for name in names if ".conv" in name and first <= int(name[5]) + 1 <= last]
    begin, end = {2: 1, 3: 4, 4: 7, 5: 14}[first], {2: 4, 3: 7, 4: 14, 5: 19}[last]
    return [name for name in names if begin <= int(name.split(".")[1]) < end]


@pytest.mark.parametrize("network", [ResNetDW, MobileNetV2])
@pytest.mark.parametrize("stages", [None, "c2-c5", "c3-c5", "c4", "c2-c3"])
def test_places(network, stages):
    with torch.device("meta"):
        net = network(
            conv3x3=dict(layer="dk", stages=stages), conv1x1=dict(layer="mdconv", stages=stages, offset_groups=2)
        )
        ours = {name: m for name, m in net.named_modules() if isinstance(m, RigidAtRest)}
        for size, layer_class in (((3, 3), LocalDeformKernel2d), ((1, 1), ModulatedDeformConv2d)):
            found = [name for name, m in ours.items() if type(m) is layer_class]
            assert found == convolutions(network, stages, size)
            assert found


@both
@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(network, options, frozen):
    net = network(**options, conv3x3="dk", frozen_stages=frozen).train()
    stopped = {m for part in net._parts()[: frozen + 1] for module in part for m in module.modules()}
    assert all(m.training == (m not in stopped) for m in net.modules())
    parameters = {p for m in stopped for p in m.parameters(recurse=False)}
    assert all(p.requires_grad == (p not in parameters) for p in net.parameters())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net(torch.rand(2, 3, 64, 96))
    assert all(norm.num_batches_tracked == (norm not in stopped) for norm in norms)
    assert len(parameters) > len(branches(net)) or frozen < 4


@both
def test_norm_eval(network, options):
    net = network(**options, norm_eval=True)
    assert net.train() is net
    assert net.training
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m.training for m in net.eval().modules())


@both
@places
def test_copies_and_autocast(network, options, layers):
    net = network(**options, **layers)
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
    "no feature": (dict(out_indices=()), ValueError, r"out_indices must be of 0 to 3 and ascending, got \(\)"),
    "order": (dict(out_indices=(2, 1)), ValueError, "out_indices must be of 0 to 3 and ascending"),
    "index": (dict(out_indices=(4,)), ValueError, "out_indices must be of 0 to 3"),
    "classes": (dict(num_classes=0), ValueError, "num_classes must be None or at least 1, got 0"),
    "frozen": (dict(frozen_stages=5), ValueError, "frozen_stages must be -1 to 4, the number of stages, got 5"),
    "frozen, cut": (dict(frozen_stages=3, out_indices=(1,)), ValueError, "frozen_stages must be -1 to 2"),
    "token": (dict(conv3x3="dcn"), ValueError, "no layer has the token 'dcn'"),
    "RoI layer": (dict(conv3x3="dpool"), TypeError, "layer must be a convolution layer"),
    "no token": (dict(conv1x1=dict(scope_size=2)), ValueError, "conv1x1 lacks the token of a layer"),
    "option": (dict(conv3x3=dict(layer="dk", scope=4)), TypeError, "scope"),
    "scope": (dict(conv3x3=dict(layer="dk", scope_size=2)), ValueError, "scope_size must be .* at least kernel_size"),
    "twice": (dict(conv3x3=["dk", dict(layer="gdk", stages="c4-c5")]), ValueError, "conv3x3 names c4 twice"),
    "stage": (dict(conv3x3=dict(layer="dk", stages="c1-c5")), ValueError, "stages='c1-c5', expected one or a range"),
    "backwards": (dict(conv3x3=dict(layer="dk", stages="c5-c3")), ValueError, "stages='c5-c3', expected"),
    "no string": (dict(conv3x3=dict(layer="dk", stages=(3, 4))), ValueError, r"stages=\(3, 4\), expected"),
    "cut off": (
        dict(conv3x3=dict(layer="dk", stages="c3-c5"), out_indices=(2,)),
        ValueError,
        "expected one or a range of c2 to c4, such as 'c3-c4'",
    ),
}


@both
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(network, options, wrong, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        network(**options, **wrong)
