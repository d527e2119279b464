import copy
import pickle
import re

import pytest
import torch
import torchvision
from torch import nn

from dk_detection.layers import DeformConv2d, ModulatedDeformConv2d, table

LAYERS = [DeformConv2d, ModulatedDeformConv2d]
both = pytest.mark.parametrize("layer_class", LAYERS)
both_with_factor = pytest.mark.parametrize(("layer_class", "factor"), [(DeformConv2d, 1), (ModulatedDeformConv2d, 2)])

# Unequal and odd everywhere, so that a swap of height and width, or of groups and offset groups, shows.
GEOMETRIES = {
    "plain": (dict(in_channels=4, out_channels=6, kernel_size=3), 1),
    "stride": (dict(in_channels=4, out_channels=6, kernel_size=3, stride=(2, 1), padding=(1, 2)), 1),
    "dilation": (dict(in_channels=4, out_channels=6, kernel_size=(3, 2), padding=(2, 0), dilation=(2, 1)), 2),
    "groups": (dict(in_channels=6, out_channels=4, kernel_size=(1, 3), padding=1, groups=2, bias=False), 3),
    "depthwise": (dict(in_channels=6, out_channels=6, kernel_size=3, stride=2, padding=1, groups=6), 2),
    "pointwise": (dict(in_channels=6, out_channels=5, kernel_size=1, stride=(1, 2)), 6),
    "same": (dict(in_channels=4, out_channels=6, kernel_size=(5, 3), dilation=(1, 3), padding="same"), 4),
    "valid": (dict(in_channels=4, out_channels=6, kernel_size=2, padding="valid"), 1),
}
geometries = pytest.mark.parametrize(("geometry", "offset_groups"), GEOMETRIES.values(), ids=GEOMETRIES.keys())

# Two float64 sums of at most a hundred products of order one, in different orders.
CLOSE = dict(rtol=1e-10, atol=1e-10)


def learned(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that has left the rest state: its offsets are a few pixels long, its modulations spread over (0, 1)."""
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    nn.init.normal_(layer.conv_offset.bias)
    return layer


@geometries
@both_with_factor
def test_resting_layer_is_the_rigid_convolution(layer_class, factor, geometry, offset_groups):
    conv = nn.Conv2d(**geometry, dtype=torch.float64)
    layer = layer_class.from_rigid(conv, offset_groups=offset_groups)
    x = torch.randn(2, conv.in_channels, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), **CLOSE)
    assert torch.equal(layer.weight, factor * conv.weight)
    assert layer.weight.data_ptr() != conv.weight.data_ptr()
    assert (layer.bias is None) == (conv.bias is None)
    if conv.bias is not None:
        assert torch.equal(layer.bias, conv.bias)
        assert layer.bias.data_ptr() != conv.bias.data_ptr()


@geometries
@both
def test_branch_steers_the_operator(layer_class, geometry, offset_groups):
    layer = learned(layer_class(**geometry, offset_groups=offset_groups, dtype=torch.float64))
    x = torch.randn(2, layer.in_channels, 9, 12, dtype=torch.float64)
    values = layer.conv_offset(x)
    offsets = 2 * offset_groups * layer.kernel_size[0] * layer.kernel_size[1]
    mask = values[:, offsets:].sigmoid() if layer_class is ModulatedDeformConv2d else None
    if mask is None:
        assert values.shape[1] == offsets
    expected = torchvision.ops.deform_conv2d(
        x, values[:, :offsets], layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, mask
    )
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@both
@pytest.mark.parametrize("at_rest", [True, False])
def test_gradients_reach_input_and_every_parameter(layer_class, at_rest):
    layer = layer_class(4, 6, (3, 2), padding=1, groups=2, offset_groups=4)
    if not at_rest:
        learned(layer)
    x = torch.randn(2, 4, 7, 8, requires_grad=True)
    (layer(x) * torch.randn(2, 6, 7, 9)).sum().backward()
    for name, tensor in [("input", x), *layer.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
        # At rest as well: a branch without a gradient there would never start to learn.
        assert tensor.grad.flatten(1).ne(0).any(1).all() if tensor.dim() > 1 else tensor.grad.ne(0).all(), name


@both
def test_empty_batch(layer_class):
    layer = layer_class(4, 6, 3, padding=1)
    x = torch.zeros(0, 4, 7, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 6, 7, 8)
    assert x.grad.shape == x.shape
    assert all(p.grad.eq(0).all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("layer_class", "peer_class"),
    [(DeformConv2d, "DeformConv2dPack"), (ModulatedDeformConv2d, "ModulatedDeformConv2dPack")],
)
def test_checkpoints_of_mmcv_load_key_for_key(layer_class, peer_class):
    peer_class = getattr(pytest.importorskip("mmcv.ops"), peer_class)
    geometry = dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=1, groups=2, bias=False)
    theirs = learned(peer_class(**geometry, deform_groups=2))
    ours = layer_class(**geometry, offset_groups=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 12)
    # float32 sums of 18 products of order one.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(layer_class, how):
    layer = learned(layer_class(4, 6, 3, padding="same", offset_groups=2)).eval()
    twin = how(layer)
    x = torch.randn(1, 4, 7, 8)
    assert torch.equal(twin(x), layer(x))
    nn.init.zeros_(twin.weight)
    assert layer.weight.ne(0).any()
    twin.reset_parameters()
    assert layer.conv_offset.weight.ne(0).any()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(layer_class, dtype):
    layer = learned(layer_class(4, 6, 3, padding=1, dtype=dtype))
    # The twin takes the branch's rounded values, so that only the precision of the sums differs.
    x = torch.randn(2, 4, 7, 8, dtype=dtype)
    twin = copy.deepcopy(layer).float()
    values = layer.conv_offset(x).float()
    twin.conv_offset.forward = lambda input: values
    y = layer(x)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps  # weight, mask and result are rounded once each
    torch.testing.assert_close(y.float(), twin(x.float()), rtol=4 * eps, atol=4 * eps)


@both
def test_autocast(layer_class):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = layer_class.from_rigid(conv)
    x = torch.randn(2, 4, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), conv(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps  # the result is rounded once on either side
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=2 * eps)
    y.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.ne(0).any()


@both
def test_memory_format_follows_the_input(layer_class):
    layer = learned(layer_class(4, 6, 3, padding=1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 7, 8)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@both
def test_compiles_without_a_break(layer_class):
    layer = learned(layer_class(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 7, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@both
def test_starts_at_rest_with_the_weights_of_a_convolution(layer_class):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    torch.manual_seed(0)
    layer = layer_class(4, 6, 3)
    assert torch.equal(layer.weight, conv.weight)
    assert torch.equal(layer.bias, conv.bias)
    assert layer.conv_offset.weight.eq(0).all()
    assert layer.conv_offset.bias.eq(0).all()
    assert isinstance(layer, nn.Conv2d)


@both
def test_reset_parameters_in_any_order(layer_class):
    layer = learned(layer_class(4, 6, 3))
    weight = layer.weight.clone()
    for module in layer.modules():  # as FSDP fills modules that were built on the meta device
        module.reset_parameters()
    assert layer.conv_offset.weight.eq(0).all()
    assert layer.conv_offset.bias.eq(0).all()
    assert not torch.equal(layer.weight, weight)

    learned(layer).reset_parameters()
    assert layer.conv_offset.weight.eq(0).all()


@both
def test_device_and_dtype_reach_every_parameter(layer_class):
    layer = layer_class(4, 6, 3, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


@both
def test_repr_shows_the_geometry(layer_class):
    text = repr(layer_class(4, 6, 3, stride=2, padding=1, groups=2, bias=False, offset_groups=2))
    assert text.splitlines()[1].strip() == (
        "4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False, offset_groups=2"
    )


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(offset_groups=3), "offset_groups must be positive and divide in_channels, got offset_groups=3, in_ch"),
        (dict(offset_groups=0), "offset_groups must be positive and divide in_channels, got offset_groups=0, in_ch"),
        (dict(padding_mode="reflect"), "padding_mode must be 'zeros', got 'reflect'"),
        (dict(kernel_size=2, padding="same"), "padding='same' needs an even dilation * (kernel_size - 1), so that"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size must be an int or a pair, at least 1, got (3, 3, 3)"),
        (dict(stride=0), "stride must be an int or a pair, at least 1, got (0, 0)"),
        (dict(dilation=(1, 0)), "dilation must be an int or a pair, at least 1, got (1, 0)"),
        (dict(padding=(1, -1)), "padding must be an int or a pair, at least 0, got (1, -1)"),
    ],
)
def test_bad_arguments_are_named(layer_class, arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"{layer_class.__name__}: {message}")):
        layer_class(**(dict(in_channels=4, out_channels=6, kernel_size=3) | arguments))


@both
def test_errors_of_nn_conv2d_stay(layer_class):
    with pytest.raises(ValueError, match="Invalid padding string"):
        layer_class(4, 6, 3, padding="full")
    with pytest.raises(ValueError, match="strided"):
        layer_class(4, 6, 3, stride=2, padding="same")


def test_table_lists_every_layer_once():
    from dk_detection import layers

    assert {row.layer.__name__ for row in table.TABLE} == set(layers.__all__)
    assert all(row.name == f"Dk{row.layer.__name__}" for row in table.TABLE)
    assert len({row.token for row in table.TABLE}) == len(table.TABLE)
    # Parts of a config's name are joined by "_" and "-".
    assert all(row.token.isalnum() and row.token.islower() for row in table.TABLE)


def test_table_is_found_by_token():
    assert table.find("dconv").layer is DeformConv2d
    assert table.find("mdconv").layer is ModulatedDeformConv2d
    with pytest.raises(ValueError, match="no layer has the token 'dcn'; the tokens are dconv, mdconv"):
        table.find("dcn")
