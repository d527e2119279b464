import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dk_detection import to_deformable
from dk_detection.convert import exchanges
from dk_detection.layers import DeformConv2d, GlobalDeformKernel2d, LocalDeformKernel2d, ModulatedDeformConv2d

torchvision = pytest.importorskip("torchvision")
from tests.networks import settled  # noqa: E402  (needs torchvision)

both = pytest.mark.parametrize("layer_class", [DeformConv2d, ModulatedDeformConv2d])


NETWORKS = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(), "layer[234].*.conv2"),
    "torchvision resnet18, all": (lambda: torchvision.models.resnet18(), "*"),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), lambda name, conv: conv.groups > 1),
    "mmdet ResNet-18": (
        lambda: pytest.importorskip("mmdet.models.backbones").ResNet(depth=18),
        ["layer3.*.conv?", "layer4.*.conv?"],
    ),
}


@both
@pytest.mark.parametrize(("build", "select"), NETWORKS.values(), ids=NETWORKS.keys())
def test_output_stays(layer_class, build, select):
    net = settled(build())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        names = to_deformable(net, layer_class, select=select)
        after = net(x)
    assert names == [name for name, m in net.named_modules() if isinstance(m, layer_class)]
    outputs = zip(after, before, strict=True) if isinstance(before, tuple) else [(after, before)]
    for ours, expected in outputs:
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("build", [torchvision.models.resnet50, torchvision.models.mobilenet_v2])
def test_deformable_kernels_everywhere(build):
    """The 3x3 convolutions of the blocks out of a 4x4 scope, all 1x1 convolutions with a kernel for each image."""
    net = settled(build(num_classes=5))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        to_deformable(net, "dk", select=lambda name, conv: conv.kernel_size == (3, 3) and conv.in_channels > 3)
        to_deformable(net, "gdk", select=lambda name, conv: conv.kernel_size == (1, 1))
        assert (net(x) - before).abs().max() <= 1e-4 * before.abs().max()
    layers = [m for m in net.modules() if isinstance(m, (LocalDeformKernel2d, GlobalDeformKernel2d))]
    assert {layer.scope_size for layer in layers} == {(4, 4), (2, 2)}
    net.train()
    nn.functional.cross_entropy(net(x), torch.tensor([1, 3])).backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    assert all(layer.kernel_offset.weight.ne(0).any() for layer in layers)


def test_returned_names():
    net = torchvision.models.resnet18()
    assert to_deformable(net, "mdconv", select="layer[34].*.conv2") == [
        "layer3.0.conv2",
        "layer3.1.conv2",
        "layer4.0.conv2",
        "layer4.1.conv2",
    ]
    assert type(net.layer3[0].conv2) is ModulatedDeformConv2d
    assert type(net.layer3[0].conv1) is nn.Conv2d
    # In the order of the modules, not of the patterns.
    net = torchvision.models.resnet18()
    assert to_deformable(net, "dconv", select=iter(["layer2.0.conv1", "layer1.1.conv?"])) == [
        "layer1.1.conv1",
        "layer1.1.conv2",
        "layer2.0.conv1",
    ]


@both
def test_every_property_of_the_convolution_is_kept(layer_class):
    net = nn.Sequential(
        nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2, dtype=torch.float64),
        nn.Conv2d(6, 4, 3, padding="same", bias=False).eval(),
        nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),
        nn.Conv2d(4, 4, 3, groups=4),  # its weight is contiguous in both formats
    )
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    old = list(net)
    to_deformable(net, layer_class, select="*", offset_groups=2)
    for new, conv in zip(net, old, strict=True):
        assert new.offset_groups == 2
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "training"):
            assert getattr(new, attribute) == getattr(conv, attribute), attribute
        assert new.conv_offset.training == conv.training
        assert new.weight.dtype == new.conv_offset.weight.dtype == conv.weight.dtype
        assert new.weight.stride() == conv.weight.stride()
        assert new.weight.requires_grad == conv.weight.requires_grad
        assert (new.bias is None) == (conv.bias is None)
        assert conv.bias is None or new.bias.requires_grad == conv.bias.requires_grad
        assert all(p.requires_grad == conv.weight.requires_grad for p in new.conv_offset.parameters())
    assert net[0].padding == (2, 0)
    assert net[1].padding == (1, 1)
    assert net[2].conv_offset.weight.is_contiguous(memory_format=torch.channels_last)
    assert net[0].conv_offset.weight.is_contiguous()
    assert net[3].conv_offset.weight.is_contiguous()


@pytest.mark.cuda
@both
def test_device_is_kept(layer_class):
    net = nn.Sequential(nn.Conv2d(4, 6, 3)).cuda()
    x = torch.randn(2, 4, 7, 8, device="cuda")
    before = net(x)
    to_deformable(net, layer_class, select="0")
    assert all(p.is_cuda for p in net.parameters())
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-3)  # cuDNN may use TF32


def test_shared_convolution_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    net = nn.ModuleDict(dict(a=conv, b=nn.Sequential(conv), c=block, d=block))
    assert to_deformable(net, DeformConv2d, select=["b.0", "d.0"]) == ["a", "b.0", "c.0", "d.0"]
    assert net["a"] is net["b"][0]
    assert net["a"] is not conv
    assert isinstance(net["a"], DeformConv2d)
    assert net["c"] is net["d"] is block
    assert isinstance(block[0], DeformConv2d)


def test_deformable_layers_are_left_alone():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert to_deformable(net, "mdconv", select="0") == ["0"]
    first = net[0]
    assert to_deformable(net, "dconv", select="*") == ["2"]
    assert net[0] is first
    assert type(first.conv_offset) is type(net[2].conv_offset)
    assert not any(isinstance(m, (DeformConv2d, ModulatedDeformConv2d)) for m in first.children())
    with pytest.raises(ValueError, match=r"select='\*' matches no rigid nn.Conv2d of the module \(there is none\)"):
        to_deformable(net, "dconv", select="*")


def test_other_convolutions_are_not_touched():
    net = nn.ModuleList([nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.Conv2d(4, 4, 3)])
    assert to_deformable(net, "dconv", select="*") == ["3"]


def test_network_trains_and_its_checkpoint_comes_back():
    net = torchvision.models.resnet18(num_classes=5)
    to_deformable(net, "mdconv", select="layer4.*.conv2")
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    assert net.layer4[1].conv2.conv_offset.weight.ne(0).any()
    twin = torchvision.models.resnet18(num_classes=5)
    to_deformable(twin, "mdconv", select="layer4.*.conv2")
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin.eval()(x), net.eval()(x))


# ---- What is refused. Each of these networks has a convolution "1" that cannot be exchanged, behind one that can.


class StandardisedConv2d(nn.Conv2d):
    """The kind timm calls StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SamePaddedConv2d(nn.Conv2d):
    """The kind timm calls Conv2dSame: pads by the input's size."""

    def forward(self, x):
        pads = []
        for axis in (1, 0):
            size, stride, kernel = x.shape[2 + axis], self.stride[axis], self.kernel_size[axis]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, pads))


class DropoutConv2d(nn.Conv2d):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), training=self.training)


class QuantisedConv2d(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x).round()


class MaskedConv2d(nn.Conv2d):
    def forward(self, x, mask):
        return super().forward(x) * mask


class CosineConv2d(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, nn.functional.normalize(weight), bias)


class NormedConv2d(nn.Conv2d):
    """The kind Detectron2 calls Conv2d: a normalisation sits inside."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


def with_zero_weight():
    conv = StandardisedConv2d(4, 4, 3)
    nn.init.zeros_(conv.weight)  # and then it computes, for the time being, what nn.Conv2d computes
    return conv


def with_hook(register):
    conv = nn.Conv2d(4, 4, 3)
    getattr(conv, register)(lambda *args: None)
    return conv


def with_own_forward():
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = functools.partial(nn.functional.conv2d, weight=conv.weight)
    return conv


def pruned():
    return prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)


def with_buffer():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_buffer("scale", torch.ones(1), persistent=False)
    return conv


ELSE = "forward does not compute what nn.Conv2d computes"
REFUSED = {
    "standardised weight": (lambda: StandardisedConv2d(4, 4, 3), ELSE),
    "standardised, zero weight": (with_zero_weight, ELSE),
    "padded by size": (lambda: SamePaddedConv2d(4, 4, 2, stride=3), ELSE),
    "other result in training": (lambda: DropoutConv2d(4, 4, 3).eval(), ELSE),
    "other result in evaluation": (lambda: QuantisedConv2d(4, 4, 3), ELSE),
    "two inputs": (lambda: MaskedConv2d(4, 4, 3), ELSE),
    "own _conv_forward": (lambda: CosineConv2d(4, 4, 3), ELSE),
    "forward of the instance": (with_own_forward, ELSE),
    "norm inside": (lambda: NormedConv2d(4, 4, 3), "more than a weight and a bias .*norm"),
    "buffer": (with_buffer, "more than a weight and a bias .scale."),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "weight is not a plain nn.Parameter"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "weight is not a plain nn.Para"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), "weight is not a plain nn.Parameter"),
    "pruned": (pruned, "weight is not a plain nn.Parameter"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "weight is not a plain nn.Parameter but a UninitializedParameter"),
    "forward hook": (lambda: with_hook("register_forward_hook"), r"has hooks \(_forward_hooks\)"),
    "forward pre-hook": (lambda: with_hook("register_forward_pre_hook"), r"has hooks \(_forward_pre_hooks\)"),
    "backward hook": (lambda: with_hook("register_full_backward_hook"), r"has hooks \(_backward_hooks\)"),
    "state dict hook": (lambda: with_hook("register_state_dict_pre_hook"), r"has hooks \(_state_dict_pre_hooks\)"),
    "padding mode": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode must be 'zeros'"),
    "uneven padding": (lambda: nn.Conv2d(4, 4, 2, padding="same"), "padding='same' needs an even dilation"),
    "offset groups": (lambda: nn.Conv2d(3, 4, 3), "offset_groups must be positive and divide in_channels"),
}


@both
@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal_names_the_convolution_and_changes_nothing(layer_class, build, message):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), build(), nn.Conv2d(4, 4, 3))
    modules, state = list(net.modules()), copy.deepcopy(net[0].state_dict())
    name = type(net[1]).__name__
    with pytest.raises(ValueError, match=rf"^to_deformable: cannot exchange '1' \({name}\): .*{message}"):
        to_deformable(net, layer_class, select="*", offset_groups=2)
    assert [id(m) for m in net.modules()] == [id(m) for m in modules]
    assert all(torch.equal(net[0].state_dict()[key], value) for key, value in state.items())
    # What is not selected is not asked.
    assert to_deformable(net, layer_class, select=["0", "2"], offset_groups=2) == ["0", "2"]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_shared_parameters_are_refused(name):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    setattr(net[1], name, getattr(net[0], name))
    with pytest.raises(ValueError, match=rf"cannot exchange '0' \(Conv2d\): its {name} is shared .*\(0, 1\)"):
        to_deformable(net, "dconv", select="0")


class GuardedConv2d(nn.Conv2d):
    """A subclass that adds nothing to the result: it looks at its input first."""

    def forward(self, x):
        assert x.dim() == 4
        return super().forward(x)


@both
@pytest.mark.parametrize(
    "conv_class",
    [lambda *args, **kwargs: pytest.importorskip("mmcv.cnn").bricks.Conv2d(*args, **kwargs), GuardedConv2d],
)
@pytest.mark.parametrize("geometry", [dict(stride=2, padding=1), dict(padding="same", groups=2, bias=False)])
def test_subclasses_that_compute_the_same_are_exchanged(layer_class, conv_class, geometry):
    conv = conv_class(4, 4, 3, **geometry)
    state = copy.deepcopy(conv.state_dict())
    net = nn.Sequential(conv)
    x = torch.randn(2, 4, 9, 8)
    before = net(x)
    assert to_deformable(net, layer_class, select="0") == ["0"]
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(conv.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("select", ["layer9.*", ["layer1.*", "layer9.*"], lambda name, conv: False])
def test_nothing_selected(select):
    net = torchvision.models.resnet18()
    with pytest.raises(ValueError, match=r"matches no rigid nn.Conv2d of the module \(there are 20, such as conv1, "):
        to_deformable(net, "dconv", select=select)
    assert not any(isinstance(m, DeformConv2d) for m in net.modules())


def test_empty_select():
    with pytest.raises(ValueError, match=r"select=\[\] matches no rigid nn.Conv2d"):
        to_deformable(nn.Sequential(nn.Conv2d(4, 4, 3)), "dconv", select=[])


def test_wrong_arguments():
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    for module in (net[0], DeformConv2d(4, 4, 3)):
        with pytest.raises(TypeError, match=r"module must hold the convolutions, but is one itself .* from_rigid"):
            to_deformable(module, "dconv", select="*")
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got list"):
        to_deformable([net], "dconv", select="*")
    with pytest.raises(ValueError, match="no layer has the token 'dcn'; the tokens are dconv, mdconv"):
        to_deformable(net, "dcn", select="*")
    for layer in (nn.Conv2d, DeformConv2d(4, 4, 3), None):
        with pytest.raises(TypeError, match="layer must be a convolution layer of dk_detection or its token"):
            to_deformable(net, layer, select="*")
    for select in (3, [3], None):
        with pytest.raises(TypeError, match="select must be a function, a pattern or several patterns"):
            to_deformable(net, "dconv", select=select)
    with pytest.raises(TypeError, match="deform_groups"):
        to_deformable(net, "dconv", select="*", deform_groups=2)
    with pytest.raises(TypeError, match="stride"):
        to_deformable(net, "dconv", select="*", stride=2)
    assert type(net[0]) is nn.Conv2d


# The grammar of configs.


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one], lambda one: (one,)], ids=["one", "list", "tuple"])
def test_exchanges(wrap):
    one = dict(layer="mdconv", select=["0", "2"], offset_groups=2)
    assert exchanges(wrap(one)) == [one]


def test_exchanges_of_a_lazy_config():
    omegaconf = pytest.importorskip("omegaconf")
    value = omegaconf.OmegaConf.create([{"layer": "dk", "select": ["a", "b"], "scope_size": [5, 4]}])
    net = nn.ModuleDict(dict(a=nn.Conv2d(2, 2, 3), b=nn.Conv2d(2, 2, 3), c=nn.Conv2d(2, 2, 3)))
    names = [name for arguments in exchanges(value) for name in to_deformable(net, **arguments)]
    assert names == ["a", "b"]
    assert net["a"].scope_size == (5, 4)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("mdconv", TypeError, "exchange must be dict.* or several of them, got 'mdconv'"),
        (None, TypeError, "exchange must be dict.* or several of them, got None"),
        (["mdconv"], TypeError, "exchange must hold dict.*, got 'mdconv'"),
        ([dict(layer="mdconv")], ValueError, "exchange needs select=... in {'layer': 'mdconv'}"),
        (dict(select="*"), ValueError, "exchange needs layer=... in {'select': '\\*'}"),
    ],
)
def test_wrong_exchanges(value, error, message):
    with pytest.raises(error, match=message):
        exchanges(value)


@pytest.mark.parametrize("token", ["mdconv", "dk", "gdk", "dkdconv", "scc"])
def test_branches_of_frozen_convolutions_are_frozen(token):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    net[0].weight.requires_grad_(False)
    to_deformable(net, token, select="*")
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if name.startswith("0.")} == {"0.bias"}
    assert all(parameter.requires_grad for parameter in net[1].parameters())
