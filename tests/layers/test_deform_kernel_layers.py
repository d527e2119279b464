"""Layers whose weight is larger than the kernel they convolve with: deformable kernels, and conditional convolution."""

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dk_detection import fold_scopes, reference, to_deformable
from dk_detection.layers import (
    CondConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    ModulatedDeformKernelConv2d,
    _per_image,
    table,
)
from dk_detection.layers._base import ZeroConv2d
from tests.loaders import loaders

LAYERS = {
    "global": (GlobalDeformKernel2d, {}),
    "local": (LocalDeformKernel2d, {}),
    "combined": (DeformKernelConv2d, {}),
    "modulated": (ModulatedDeformKernelConv2d, {}),
    "cond": (CondConv2d, dict(num_experts=3)),
}
layers = pytest.mark.parametrize(("layer_class", "options"), LAYERS.values(), ids=LAYERS.keys())
scoped = pytest.mark.parametrize(
    ("layer_class", "options"),
    [LAYERS[name] for name in LAYERS if name != "cond"],
    ids=[n for n in LAYERS if n != "cond"],
)

# Unequal and odd everywhere, so that a swap of height and width shows.
GEOMETRIES = {
    "plain": dict(in_channels=4, out_channels=6, kernel_size=3),
    "stride": dict(in_channels=4, out_channels=6, kernel_size=3, stride=(2, 1), padding=(1, 2)),
    "dilation": dict(in_channels=4, out_channels=6, kernel_size=(3, 2), padding=(2, 0), dilation=(2, 1)),
    "groups": dict(in_channels=6, out_channels=4, kernel_size=(1, 3), padding=1, groups=2, bias=False),
    "depthwise": dict(in_channels=6, out_channels=6, kernel_size=3, stride=2, padding=1, groups=6),
    "pointwise": dict(in_channels=6, out_channels=5, kernel_size=1, stride=(1, 2)),
    "pointwise_padded": dict(in_channels=6, out_channels=5, kernel_size=1, padding=1, bias=False),
    "same": dict(in_channels=4, out_channels=6, kernel_size=(5, 3), dilation=(1, 3), padding="same"),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())

# Two float64 sums of at most a hundred products of order one, in different orders.
CLOSE = dict(rtol=1e-10, atol=1e-10)
# The same in float32.
CLOSE32 = dict(rtol=1e-5, atol=1e-5)


def branches(layer):
    return {name: child for name, child in layer.named_children() if isinstance(child, ZeroConv2d)}


def learned(module: nn.Module) -> nn.Module:
    """Layers that have left the rest state, as far as some taps being clipped."""
    for child in module.modules():
        if isinstance(child, ZeroConv2d):
            nn.init.normal_(child.weight, std=0.3)
            nn.init.normal_(child.bias, std=0.3)
    return module


@geometries
@layers
def test_resting_layer_is_the_rigid_convolution(layer_class, options, geometry):
    conv = nn.Conv2d(**geometry, dtype=torch.float64)
    layer = layer_class.from_rigid(conv, **options)
    x = torch.randn(2, conv.in_channels, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), **CLOSE)


@scoped
@pytest.mark.parametrize("scope_size", [3, 4, 5, 9, (4, 3), (3, 8)], ids=str)
def test_any_scope_size(layer_class, options, scope_size):
    for groups in (2, 6):
        conv = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=groups, dtype=torch.float64)
        layer = layer_class.from_rigid(conv, scope_size=scope_size, **options)
        size = (scope_size, scope_size) if isinstance(scope_size, int) else scope_size
        assert layer.weight.shape == (6, 6 // groups, *size)
        x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), conv(x), **CLOSE)


@scoped
def test_scope_is_one_larger_than_the_kernel(layer_class, options):
    assert layer_class(4, 6, 3, **options).weight.shape == (6, 4, 4, 4)
    assert layer_class(4, 6, 1, **options).weight.shape == (6, 4, 2, 2)
    assert layer_class(4, 6, (1, 3), **options).weight.shape == (6, 4, 2, 4)


KERNELS_AND_SCOPES = [
    *[((3, 2), (4, 5)), ((3, 3), (9, 4)), ((2, 3), (2, 3)), ((1, 1), (3, 5)), ((3, 3), (3, 3)), ((3, 3), (5, 5))],
    *[((1, 1), (2, 2)), ((1, 3), (4, 4)), ((1, 1), (1, 2))],
]
kernels_and_scopes = pytest.mark.parametrize(("kernel", "scope"), KERNELS_AND_SCOPES, ids=str)


def at_rest(layer):
    """What the layer's taps sample without offset, [out_channels, in_channels / groups, kH, kW]."""
    rest = torch.zeros(1, 2 * math.prod(layer.kernel_size)).double()
    return reference.resample_kernel(layer.scope().double(), rest, kernel_size=layer.kernel_size)[0]


def corner(layer):
    return layer.weight[tuple(slice(size) for size in layer.rigid_shape)]


@kernels_and_scopes
def test_kernel_at_rest_is_the_corner_of_the_weight(kernel, scope):
    """And whatever else is in the weight makes no difference to it."""
    layer = LocalDeformKernel2d(4, 6, kernel, scope_size=scope, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    torch.testing.assert_close(at_rest(layer), corner(layer), **CLOSE)


@kernels_and_scopes
def test_basis_is_orthonormal_beside_the_corner(kernel, scope):
    layer = LocalDeformKernel2d(1, 1, kernel, scope_size=scope, dtype=torch.float64)
    cells = math.prod(scope)
    basis = layer._full_basis().t().view(*scope, cells)  # of each value of the weight
    beside = basis[kernel[0] :, kernel[1] :].flatten(0, 1)
    torch.testing.assert_close(beside @ beside.t(), torch.eye(len(beside)).double(), **CLOSE)
    assert torch.linalg.matrix_rank(basis.flatten(0, 1)) == cells


@pytest.mark.parametrize(("kernel", "scope"), [((3, 2), (4, 5)), ((3, 3), (9, 4)), ((2, 3), (2, 3)), ((1, 1), (3, 5))])
def test_lifted_scope_is_the_smallest(kernel, scope):
    rigid = nn.Conv2d(4, 6, kernel, dtype=torch.float64)
    lifted = LocalDeformKernel2d.from_rigid(rigid, scope_size=scope).scope()
    # The resampling at rest as a matrix, and the solution of least norm from a library.
    cells = torch.eye(scope[0] * scope[1], dtype=torch.float64).view(-1, 1, *scope)
    rest = reference.resample_kernel(cells, torch.zeros(1, 2 * math.prod(kernel)).double(), kernel_size=kernel)
    matrix = rest.reshape(cells.shape[0], -1).t()  # [taps, cells]
    solution = torch.linalg.lstsq(matrix, rigid.weight.flatten(0, 1).flatten(1).t(), driver="gelsd").solution
    torch.testing.assert_close(lifted.flatten(0, 1).flatten(1), solution.t(), **CLOSE)


@pytest.mark.parametrize(("kernel", "scope"), [((1, 1), (2, 2)), ((1, 3), (4, 4)), ((1, 1), (1, 2))])
def test_cells_around_a_single_tap_differ(kernel, scope):
    rigid = nn.Conv2d(16, 24, kernel, dtype=torch.float64)
    layer = LocalDeformKernel2d.from_rigid(rigid, scope_size=scope)
    assert torch.equal(layer.scope(), LocalDeformKernel2d.from_rigid(rigid, scope_size=scope).scope())
    torch.testing.assert_close(at_rest(layer), rigid.weight, **CLOSE)
    for axis in (2, 3):
        if kernel[axis - 2] == 1 and scope[axis - 2] > 1:
            middle = scope[axis - 2] // 2
            apart = layer.scope().select(axis, middle) - layer.scope().select(axis, middle - 1)
            assert 1 < apart.std() / rigid.weight.std() < 3


def test_experts_differ():
    rigid = nn.Conv2d(4, 6, (3, 2))
    layer = CondConv2d.from_rigid(rigid, num_experts=3)
    assert torch.equal(layer.weight, CondConv2d.from_rigid(rigid, num_experts=3).weight)
    experts = layer.experts()
    torch.testing.assert_close(experts.sum(0), 2 * rigid.weight, **CLOSE32)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (experts[a] - experts[b]).std() > 0.5 * rigid.weight.std()


# A resting layer is the rigid one in its learning, too.


def train(net, frozen=()):
    """Ten steps on inputs that are the same for every network."""
    for branch in frozen:
        branch.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1, momentum=0.9, weight_decay=0.02)
    for _ in range(10):
        x = torch.randn(2, 6, 7, 8, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net


@layers
@pytest.mark.parametrize("kernel_size", [1, 3, (3, 1)], ids=str)
def test_resting_layer_trains_as_the_rigid_convolution(layer_class, options, kernel_size):
    sizes = [None] if layer_class is CondConv2d else [3, 4, 5, 9, (4, 6)]
    for scope_size, groups in ((size, groups) for size in sizes for groups in (1, 6)):
        conv = nn.Conv2d(6, 6, kernel_size, padding=1, groups=groups, dtype=torch.float64)
        settings = options if scope_size is None else {**options, "scope_size": scope_size}
        layer = layer_class.from_rigid(conv, **settings)
        train(conv)
        train(layer, frozen=branches(layer).values())
        torch.testing.assert_close(corner(layer), conv.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias, conv.bias, rtol=1e-12, atol=1e-12)


def test_the_papers_parametrisation_does_not():
    """The contrary of the test above, so that it is known to see a difference."""
    conv = nn.Conv2d(6, 6, 3, padding=1, dtype=torch.float64)
    layer = LocalDeformKernel2d.from_rigid(conv, parametrisation="paper")
    train(conv)
    train(layer, frozen=branches(layer).values())
    assert (at_rest(layer) - conv.weight).abs().max() > 1e-3


@scoped
@pytest.mark.parametrize("scope_size", [(3, 3), (4, 5)], ids=str)
def test_folding_changes_nothing_but_the_parametrisation(layer_class, options, scope_size):
    net = learned(nn.Sequential(layer_class(4, 6, 3, scope_size=scope_size, **options, dtype=torch.float64)))
    nn.init.normal_(net[0].weight)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    expected, scope = net(x), net[0].scope()
    assert fold_scopes(net) is net
    assert torch.equal(net(x), expected)
    assert torch.equal(net[0].weight, scope)
    paper = nn.Sequential(
        layer_class(4, 6, 3, scope_size=scope_size, parametrisation="paper", **options, dtype=torch.float64)
    )
    paper.load_state_dict(net.state_dict())
    assert torch.equal(paper(x), expected)
    assert repr(paper) == repr(net)
    fold_scopes(net)
    assert torch.equal(net(x), expected)


@geometries
@pytest.mark.parametrize("clip", [True, False])
def test_local_generators_steer_the_operator(geometry, clip):
    for layer_class, options in (
        (LocalDeformKernel2d, dict(kernel_offset_groups=2)),
        (DeformKernelConv2d, dict(kernel_offset_groups=2, offset_groups=2)),
        (ModulatedDeformKernelConv2d, dict(offset_groups=2)),
    ):
        layer = learned(layer_class(**geometry, clip=clip, **options, dtype=torch.float64))
        x = torch.randn(2, layer.in_channels, 9, 12, dtype=torch.float64)
        offset = mask = None
        taps = 2 * math.prod(layer.kernel_size)  # of both groups
        if layer_class is not LocalDeformKernel2d:
            values = layer.conv_offset(x)
            offset = values[:, : 2 * taps]
            if layer_class is ModulatedDeformKernelConv2d:
                mask = values[:, 2 * taps :].sigmoid()
            else:
                assert values.shape[1] == 2 * taps
        expected = reference.deform_kernel_conv2d(
            x,
            layer.kernel_offset(x),
            layer.scope(),
            layer.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            kernel_size=layer.kernel_size,
            offset=offset,
            mask=mask,
            clip=clip,
        )
        torch.testing.assert_close(layer(x), expected, **CLOSE)


def convolve_one_by_one(layer, x, kernels):
    return torch.cat(
        [
            F.conv2d(image, kernel, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            for image, kernel in zip(x.split(1), kernels, strict=True)
        ]
    )


@geometries
@pytest.mark.parametrize("clip", [True, False])
def test_global_generator_steers_the_kernel_of_each_image(geometry, clip):
    layer = learned(GlobalDeformKernel2d(**geometry, clip=clip, dtype=torch.float64))
    x = torch.randn(3, layer.in_channels, 9, 12, dtype=torch.float64)
    generator = layer.kernel_offset
    offset = F.linear(x.mean((2, 3)), generator.weight.flatten(1), generator.bias)
    kernels = reference.resample_kernel(layer.scope(), offset, kernel_size=layer.kernel_size, clip=clip)
    torch.testing.assert_close(layer(x), convolve_one_by_one(layer, x, kernels), **CLOSE)


@geometries
def test_cond_conv_mixes_its_experts(geometry):
    layer = learned(CondConv2d(**geometry, num_experts=3, dtype=torch.float64))
    x = torch.randn(3, layer.in_channels, 9, 12, dtype=torch.float64)
    shares = F.linear(x.mean((2, 3)), layer.routing.weight.flatten(1), layer.routing.bias).sigmoid()
    experts = layer.experts()
    # sum_e r_e (W_e * x), which is what mixing the kernels is to save
    expected = sum(
        share.view(-1, 1, 1, 1) * F.conv2d(x, expert, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        for share, expert in zip(shares.unbind(1), experts, strict=True)
    )
    if layer.bias is not None:
        expected = expected + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@geometries
def test_local_generators_have_the_geometry_of_the_layer(geometry):
    layer = DeformKernelConv2d(**geometry, kernel_offset_groups=2)
    for branch, groups in ((layer.kernel_offset, 2), (layer.conv_offset, 1)):
        for name in ("kernel_size", "stride", "padding", "dilation", "in_channels"):
            assert getattr(branch, name) == getattr(layer, name)
        assert branch.out_channels == 2 * groups * math.prod(layer.kernel_size)
        assert branch.groups == 1


@layers
@pytest.mark.parametrize("at_rest", [True, False])
@pytest.mark.parametrize("geometry", ["plain", "depthwise", "pointwise"])
def test_gradients_reach_input_and_every_parameter(layer_class, options, at_rest, geometry):
    torch.manual_seed(0)
    geometry = GEOMETRIES[geometry]
    layer = layer_class(**geometry, **options)
    if not at_rest:
        learned(layer)
    x = torch.randn(2, layer.in_channels, 7, 8, requires_grad=True)
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    for name, tensor in [("input", x), *layer.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
        # At rest as well: a branch without a gradient there would never start to learn. An offset may be clipped.
        if at_rest or name in ("input", "weight", "bias"):
            assert tensor.grad.flatten(1).ne(0).any(1).all() if tensor.dim() > 1 else tensor.grad.ne(0).all(), name
        else:
            assert tensor.grad.ne(0).any(), name


@layers
@pytest.mark.parametrize("geometry", ["plain", "depthwise", "pointwise"])
def test_empty_batch(layer_class, options, geometry):
    layer = layer_class(**GEOMETRIES[geometry], **options)
    x = torch.zeros(0, layer.in_channels, 7, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, *nn.Conv2d(**GEOMETRIES[geometry])(torch.zeros(1, layer.in_channels, 7, 8)).shape[1:])
    assert x.grad.shape == x.shape
    assert all(p.grad.eq(0).all() for p in layer.parameters())


# Memory and work of kernels made for each image.


@pytest.mark.parametrize(("layer_class", "options"), [LAYERS["global"], LAYERS["cond"]], ids=["global", "cond"])
@pytest.mark.parametrize("geometry", ["stride", "depthwise", "pointwise"])
def test_kernels_of_a_batch_in_parts(monkeypatch, layer_class, options, geometry):
    layer = learned(layer_class(**GEOMETRIES[geometry], **options, dtype=torch.float64))
    x = torch.randn(5, layer.in_channels, 9, 12, dtype=torch.float64, requires_grad=True)
    sizes = []

    def kernels_recorded(input, steering, kernels, *settings):
        def recorded(steering):
            made = kernels(steering)
            sizes.append(made.numel() * made.element_size())
            return made

        return original(input, steering, recorded, *settings)

    module = __import__(layer_class.__module__, fromlist=["conv2d_per_image"])
    original = _per_image.conv2d_per_image
    monkeypatch.setattr(module, "conv2d_per_image", kernels_recorded)
    tensors = [x, *layer.parameters()]
    whole = layer(x)
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, tensors, grad)
    one = sizes[0] // 5
    assert sizes == [5 * one] * 2  # for the forward, and again for the backward
    sizes.clear()
    monkeypatch.setattr(_per_image, "_KERNEL_BYTES", 2 * one + one // 2)
    parts = layer(x)
    torch.testing.assert_close(parts, whole, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(parts, tensors, grad), expected, **CLOSE)
    assert sorted(sizes) == sorted([2 * one, 2 * one, one] * 2)


@pytest.mark.parametrize(("layer_class", "options"), [LAYERS["global"], LAYERS["cond"]], ids=["global", "cond"])
def test_kernels_are_not_kept_and_nothing_is_convolved_twice(layer_class, options):
    layer = layer_class(64, 64, 3, padding=1, **options)
    x = torch.randn(8, 64, 3, 2, requires_grad=True)
    convolutions = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default and args[8] == 8:  # groups: an image each
                convolutions.append(args)
            return function(*args, **(kwargs or {}))

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t), Record():
        layer(x).sum().backward()
    assert len(convolutions) == 1
    assert max(kept) <= layer.weight.numel() < 8 * 64 * 64 * 9


# Checkpoints.


class Net(nn.Module):
    """A layer two levels deep, so that prefixes are in use."""

    def __init__(self, conv_class, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_class(4, 4, size, padding=1, bias=bias, **options), nn.BatchNorm2d(4), nn.ReLU())
            for bias, size in ((True, 3), (False, 1))
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@loaders
@layers
@pytest.mark.parametrize("strict", [True, False])
def test_rigid_checkpoint(layer_class, options, load, strict):
    rigid, net = Net(nn.Conv2d).eval(), learned(Net(layer_class, **options)).eval()
    state = rigid.state_dict()
    before = copy.deepcopy(state)
    load(net, state, strict)
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(net(x), rigid(x), **CLOSE32)
    assert all(torch.equal(state[key], before[key]) for key in before)


@scoped
def test_rigid_checkpoint_in_a_scope_of_kernel_size(layer_class, options):
    # The shapes are the same; what tells the two apart are the names.
    rigid, layer = nn.Conv2d(4, 6, 3), learned(layer_class(4, 6, 3, scope_size=3, **options))
    layer.load_state_dict(rigid.state_dict())
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), rigid(x), **CLOSE32)
    twin = layer_class(4, 6, 3, scope_size=3, **options)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)


@loaders
@layers
def test_own_checkpoint_loads_as_it_is(layer_class, options, load):
    net, twin = learned(Net(layer_class, **options)), Net(layer_class, **options)
    load(twin, net.state_dict(), True)
    for key, value in net.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


@layers
def test_assign_fills_a_model_on_the_meta_device(layer_class, options):
    rigid = Net(nn.Conv2d).eval()
    with torch.device("meta"):
        net = Net(layer_class, **options).eval()
    net.load_state_dict(rigid.state_dict(), assign=True)
    x = torch.randn(1, 3, 9, 8)
    torch.testing.assert_close(net(x), rigid(x), **CLOSE32)


@layers
def test_shape_mismatch_is_told_as_ever(layer_class, options):
    with pytest.raises(RuntimeError) as error:
        layer_class(4, 6, 3, **options).load_state_dict(nn.Conv2d(4, 6, 5).state_dict())
    assert "size mismatch for weight: copying a param with shape torch.Size([6, 4, 5, 5])" in str(error.value)
    assert "Missing" not in str(error.value)


# Initialisation.


@geometries
@layers
def test_new_layer_is_a_new_convolution(layer_class, options, geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(**geometry)
    torch.manual_seed(0)
    layer = layer_class(**geometry, **options)
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(1, conv.in_channels, 7, 9)
    torch.testing.assert_close(layer(x), conv(x), **CLOSE32)

    learned(layer)
    torch.manual_seed(1)
    conv.reset_parameters()
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), conv(x), **CLOSE32)


@layers
def test_reset_parameters_in_any_order(layer_class, options):
    layer = learned(layer_class(4, 6, 3, **options))
    parameters = dict(layer.named_parameters())
    weight = layer.weight.clone()
    for module in layer.modules():  # as FSDP fills modules that were built on the meta device
        module.reset_parameters()
    assert all(p.eq(0).all() for branch in branches(layer).values() for p in branch.parameters())
    assert not torch.equal(layer.weight, weight)
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())


@layers
def test_frameworks_initialise(layer_class, options):
    ResNet = pytest.importorskip("mmdet.models.backbones").ResNet
    ConvModule = pytest.importorskip("mmcv.cnn").ConvModule
    path = f"dk_detection.layers.{layer_class.__name__}"
    net = ResNet(
        depth=50, base_channels=8, stem_channels=8, dcn=dict(type=path, **options),
        stage_with_dcn=(False, False, False, True),
    )  # fmt: skip
    net.init_weights()
    found = [m for m in net.modules() if isinstance(m, layer_class)]
    assert len(found) == 3
    assert all(p.eq(0).all() for layer in found for branch in branches(layer).values() for p in branch.parameters())
    # Kaiming's normal distribution, fan_out, in the kernel at rest; the fan is counted over the cells of the scope.
    fan_out = found[0].weight.shape[0] * found[0].weight[0, 0].numel()
    assert corner(found[0]).std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    module = ConvModule(4, 6, 3, padding=1, conv_cfg=dict(type=path, **options), norm_cfg=dict(type="BN"))
    assert all(p.eq(0).all() for branch in branches(module.conv).values() for p in branch.parameters())


@layers
def test_fused_batch_norm_keeps_the_output(layer_class, options):
    fuse_conv_bn = pytest.importorskip("mmcv.cnn").fuse_conv_bn
    net = learned(nn.Sequential(layer_class(4, 6, 3, padding=1, **options), nn.BatchNorm2d(6))).eval()
    nn.init.uniform_(net[1].running_mean)
    nn.init.uniform_(net[1].weight, 0.5, 2)
    x = torch.randn(2, 4, 7, 8)
    expected = net(x)
    torch.testing.assert_close(fuse_conv_bn(net)(x), expected, **CLOSE32)
    assert isinstance(net[1], nn.Identity)


# As a module.


@layers
@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(layer_class, options, how):
    layer = learned(layer_class(4, 6, 3, padding="same", **options)).eval()
    twin = how(layer)
    x = torch.randn(1, 4, 7, 8)
    assert torch.equal(twin(x), layer(x))
    nn.init.zeros_(twin.weight)
    assert layer.weight.ne(0).any()


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(layer_class, options, dtype):
    layer = learned(layer_class(4, 6, 3, padding=1, **options, dtype=dtype))
    x = torch.randn(2, 4, 7, 8, dtype=dtype)
    # The twin takes the branches' rounded values, so that only the precision of kernels and sums differs.
    twin = copy.deepcopy(layer).float()
    for name, branch in branches(layer).items():
        getattr(twin, name).forward = lambda input, branch=branch: branch(input.to(dtype)).float()
    y, expected = layer(x), twin(x.float())
    assert y.dtype == dtype
    # Cells, kernels, products of them and results are rounded once each.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@layers
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_autocast(layer_class, options, kernel_size):
    conv = nn.Conv2d(4, 6, kernel_size)
    layer = layer_class.from_rigid(conv, **options)
    x = torch.randn(2, 4, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), conv(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps  # of the weights, which are larger cell by cell, and of the result
    torch.testing.assert_close(y, expected, rtol=4 * eps, atol=8 * eps)
    y.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.ne(0).any()


@layers
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_memory_format_follows_the_input(layer_class, options, kernel_size):
    layer = learned(layer_class(4, 6, kernel_size, **options)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 7, 8)
    y, last = layer(x), layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, **CLOSE32)


@layers
def test_compiles_without_a_break(layer_class, options):
    layer = learned(layer_class(4, 6, 3, padding=1, **options))
    x = torch.randn(2, 4, 7, 8)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x), **CLOSE32)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


@layers
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_can_be_traced(layer_class, options):  # which is how mmengine and fvcore count FLOPs
    layer = learned(layer_class(4, 6, 3, padding=1, **options))
    x = torch.randn(2, 4, 7, 8)
    traced = torch.jit.trace(layer, x)
    for shape in ((2, 4, 7, 8), (5, 4, 9, 6), (1, 4, 7, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), layer(x), **CLOSE32)


@layers
@pytest.mark.parametrize("geometry", ["stride", "depthwise", "pointwise"])
def test_is_exported_for_every_size(layer_class, options, geometry):
    layer = learned(layer_class(**GEOMETRIES[geometry], **options)).eval()
    dims = {axis: torch.export.Dim(name, min=least) for axis, name, least in ((0, "n", 1), (2, "h", 5), (3, "w", 5))}
    exported = torch.export.export(layer, (torch.randn(3, layer.in_channels, 7, 8),), dynamic_shapes=(dims,)).module()
    for shape in ((7, 9, 6), (1, 5, 5)):
        x = torch.randn(shape[0], layer.in_channels, *shape[1:])
        torch.testing.assert_close(exported(x), layer(x), **CLOSE32)


@layers
def test_device_and_dtype_reach_every_parameter(layer_class, options):
    layer = layer_class(4, 6, 3, **options, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


def test_repr_shows_the_options():
    text = repr(GlobalDeformKernel2d(4, 6, 3, padding=1, clip=False)).splitlines()[1].strip()
    assert text == "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), scope_size=(4, 4), clip=False"
    text = repr(DeformKernelConv2d(4, 6, 3, scope_size=(5, 4), offset_groups=2)).splitlines()[1]
    assert text.endswith("scope_size=(5, 4), kernel_offset_groups=1, offset_groups=2")
    text = repr(LocalDeformKernel2d(4, 6, 3, parametrisation="paper")).splitlines()[1]
    assert text.endswith("scope_size=(4, 4), parametrisation='paper', kernel_offset_groups=1")
    assert repr(CondConv2d(4, 6, 3)).splitlines()[1].endswith("num_experts=8")


@pytest.mark.parametrize(
    ("layer_class", "arguments", "message"),
    [
        (
            GlobalDeformKernel2d,
            dict(scope_size=2),
            "scope_size must be an int or a pair, at least kernel_size=(3, 3), got 2",
        ),
        (
            LocalDeformKernel2d,
            dict(scope_size=(4, 2)),
            "scope_size must be an int or a pair, at least kernel_size=(3, 3)",
        ),
        (LocalDeformKernel2d, dict(scope_size=(4, 4, 4)), "scope_size must be an int or a pair, at least kernel_size="),
        (
            LocalDeformKernel2d,
            dict(kernel_offset_groups=3),
            "kernel_offset_groups must be positive and divide in_channels",
        ),
        (
            DeformKernelConv2d,
            dict(kernel_offset_groups=0),
            "kernel_offset_groups must be positive and divide in_channels",
        ),
        (
            DeformKernelConv2d,
            dict(offset_groups=3),
            "offset_groups must be positive and divide in_channels, got offset_g",
        ),
        (
            LocalDeformKernel2d,
            dict(parametrisation="rigid"),
            "parametrisation must be one of orthonormal, paper, got 'rigid'",
        ),
        (GlobalDeformKernel2d, dict(padding_mode="reflect"), "padding_mode must be 'zeros', got 'reflect'"),
        (CondConv2d, dict(num_experts=0), "num_experts must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(layer_class, arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"{layer_class.__name__}: {message}")):
        layer_class(**(dict(in_channels=4, out_channels=6, kernel_size=3) | arguments))


def test_table_is_found_by_token():
    tokens = dict(dk=LocalDeformKernel2d, gdk=GlobalDeformKernel2d, dkdconv=DeformKernelConv2d, scc=CondConv2d)
    assert all(table.find(token).layer is layer_class for token, layer_class in tokens.items())


# Whole networks.


def random_network(name):
    """A network of torchvision with random weights and statistics that are not those of a new network."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("resnet50", ("dk", "gdk")),
        ("mobilenet_v2", ("dk", "gdk")),
        ("mobilenet_v2", ("gdk", "scc")),
        ("mobilenet_v2", ("dkdconv", "scc")),
    ],
)
def test_network_keeps_its_output_and_learns(name, tokens):
    net = random_network(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    options = {} if tokens[1] == "scc" else dict(scope_size=2)
    three = to_deformable(net, tokens[0], select=lambda _, conv: conv.kernel_size == (3, 3), scope_size=4)
    one = to_deformable(net, tokens[1], select=lambda _, conv: conv.kernel_size == (1, 1), **options)
    assert len(three) + len(one) == len([conv for conv in convs if conv.kernel_size != (7, 7)])
    with torch.no_grad():
        output = net(x)
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()

    generators = {n: m for n, m in net.named_modules() if isinstance(m, ZeroConv2d)}
    assert len(generators) == len(three) * (2 if tokens[0] == "dkdconv" else 1) + len(one)
    net.train()
    F.cross_entropy(net(x), torch.tensor([1, 2])).backward()
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    for generator_name, generator in generators.items():
        assert generator.weight.isfinite().all(), generator_name
        assert generator.weight.ne(0).any(), generator_name
