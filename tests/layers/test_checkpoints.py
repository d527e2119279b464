"""Rigid checkpoints become resting layers; all others load as they are."""

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict as load_with_mmengine
from torch import nn

from dk_detection.layers import DeformConv2d, ModulatedDeformConv2d

FACTORS = {DeformConv2d: 1, ModulatedDeformConv2d: 2}
both = pytest.mark.parametrize("layer_class", FACTORS)


def load_with_torch(module, state_dict, strict):
    module.load_state_dict(state_dict, strict=strict)


loaders = pytest.mark.parametrize("load", [load_with_torch, load_with_mmengine])


class Net(nn.Module):
    """A layer two levels deep, so that prefixes are in use."""

    def __init__(self, conv_class, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_class(4, 4, 3, padding=1, bias=bias, **options), nn.BatchNorm2d(4), nn.ReLU())
            for bias in (True, False)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def unsettled(net):
    """The same network after every offset branch has learned something."""
    for name, parameter in net.named_parameters():
        if "conv_offset" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


@loaders
@both
@pytest.mark.parametrize("strict", [True, False])
def test_rigid_checkpoint(layer_class, load, strict):
    rigid, net = Net(nn.Conv2d).eval(), unsettled(Net(layer_class, offset_groups=2)).eval()
    state = rigid.state_dict()
    before = copy.deepcopy(state)
    load(net, state, strict)
    x = torch.randn(2, 3, 9, 8)
    # Two convolutions in float32 whose sums run in another order.
    torch.testing.assert_close(net(x), rigid(x), rtol=1e-5, atol=1e-5)
    for i in range(2):
        assert torch.equal(net.blocks[i][0].weight, FACTORS[layer_class] * rigid.blocks[i][0].weight)
        assert net.blocks[i][0].conv_offset.weight.eq(0).all()
        assert net.blocks[i][0].conv_offset.bias.eq(0).all()
    # The caller's dictionary and tensors are what they were.
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)


@loaders
@both
def test_layer_alone(layer_class, load):
    rigid, layer = nn.Conv2d(4, 6, 3), unsettled(layer_class(4, 6, 3))
    state = dict(rigid.named_parameters())  # parameters, not tensors; a plain dict, not an OrderedDict
    load(layer, state, True)
    assert torch.equal(layer.weight, FACTORS[layer_class] * rigid.weight)
    assert state.keys() == {"weight", "bias"}
    assert state["weight"] is rigid.weight
    x = torch.randn(1, 4, 7, 8)
    torch.testing.assert_close(layer(x), rigid(x), rtol=1e-5, atol=1e-5)


@loaders
@both
def test_own_checkpoint_loads_as_it_is(layer_class, load):
    net, twin = unsettled(Net(layer_class)), Net(layer_class)
    load(twin, net.state_dict(), True)
    for key, value in net.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


@loaders
@both
def test_bfloat16_checkpoint(layer_class, load):
    rigid, net = Net(nn.Conv2d).bfloat16(), unsettled(Net(layer_class))
    load(net, rigid.state_dict(), True)
    layer = net.blocks[0][0]
    assert layer.weight.dtype == layer.conv_offset.weight.dtype == torch.float32
    assert torch.equal(layer.weight, FACTORS[layer_class] * rigid.blocks[0][0].weight.float())
    assert layer.conv_offset.weight.eq(0).all()


@both
def test_assign_fills_a_model_on_the_meta_device(layer_class):
    rigid = Net(nn.Conv2d).eval()
    with torch.device("meta"):
        net = Net(layer_class).eval()
    net.load_state_dict(rigid.state_dict(), assign=True)
    x = torch.randn(1, 3, 9, 8)
    torch.testing.assert_close(net(x), rigid(x), rtol=1e-5, atol=1e-5)


@both
def test_shape_mismatch_is_told_as_ever(layer_class):
    layer = layer_class(4, 6, 3)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(nn.Conv2d(4, 6, 5).state_dict())
    assert "size mismatch for weight: copying a param with shape torch.Size([6, 4, 5, 5])" in str(error.value)
    assert "Missing" not in str(error.value)
    assert torch.equal(layer.weight, before)


@both
@pytest.mark.parametrize("left_out", ["weight", "bias"])
def test_half_an_offset_branch_is_a_missing_key(layer_class, left_out):
    state = unsettled(Net(layer_class)).state_dict()
    key = f"blocks.1.0.conv_offset.{left_out}"
    del state[key]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        Net(layer_class).load_state_dict(state)
    # Not strict: the rest loads as it is, that is to say without being lifted.
    net = Net(layer_class)
    assert net.load_state_dict(state, strict=False).missing_keys == [key]
    assert torch.equal(net.blocks[1][0].weight, state["blocks.1.0.weight"])


@both
def test_checkpoint_without_the_layer_reports_all_its_keys(layer_class):
    net = Net(layer_class)
    state = {key: value for key, value in Net(nn.Conv2d).state_dict().items() if not key.startswith("blocks.0.0")}
    missing = net.load_state_dict(state, strict=False).missing_keys
    assert missing == [f"blocks.0.0.{key}" for key in net.blocks[0][0].state_dict()]


@both
def test_weight_that_is_no_tensor_is_told_as_ever(layer_class):
    with pytest.raises(RuntimeError, match=r'copying the parameter named "weight", expected torch\.Tensor'):
        layer_class(4, 6, 3).load_state_dict({"weight": [1.0], "bias": torch.zeros(6)}, strict=False)
