"""Rigid checkpoints become resting layers, older names are understood, and nothing is lost in silence."""

import copy

import pytest
import torch
from torch import nn

from dk_detection import to_deformable, translate_names
from dk_detection.layers import (
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    ModulatedDeformConv2d,
    ModulatedDeformKernelConv2d,
)
from dk_detection.layers._base import ZeroConv2d
from tests.loaders import loaders

FACTORS = {DeformConv2d: 1, ModulatedDeformConv2d: 2}
both = pytest.mark.parametrize("layer_class", FACTORS)


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


# Names of other repositories.


def renamed(state, old, new):
    return {key.replace(old, new): value for key, value in state.items()}


@loaders
@both
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("new", [".conv_offset_mask.", "_offset."], ids=["DCNv2", "MMDetection 1, Detectron2"])
def test_offset_branches_of_other_repositories(layer_class, load, strict, new):
    net, twin = unsettled(Net(nn.Conv2d)), Net(nn.Conv2d)
    for either in (net, twin):
        to_deformable(either, layer_class, select="blocks.*")
    unsettled(net)
    state = net.state_dict()
    load(twin, renamed(state, ".conv_offset.", new), strict)
    for key, value in state.items():
        assert torch.equal(twin.state_dict()[key], value), key


@loaders
@both
def test_offset_branch_beside_a_layer_of_a_slot(layer_class, load):
    """Nothing was exchanged here, and the layer does not see what is beside it: it refuses, until the network helps."""
    net, twin = unsettled(Net(layer_class)), Net(layer_class)
    state = renamed(net.state_dict(), ".conv_offset.", "_offset.")
    with pytest.raises(
        RuntimeError, match=r"'blocks.0.0_offset.weight', which would be lost.*translate_names\(network"
    ):
        load(twin, state, False)
    load(translate_names(twin), state, False)
    for key, value in net.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


UNKNOWN = [".offset_conv.", ".p_conv.", ".conv_offset2d.", "_offset2d.", "_conv_mask.", ".m_conv."]


@loaders
@both
@pytest.mark.parametrize("new", UNKNOWN)
@pytest.mark.parametrize("strict", [True, False])
def test_an_unknown_key_beside_the_weight_is_an_error(layer_class, load, new, strict):
    net = Net(nn.Conv2d)
    to_deformable(net, layer_class, select="blocks.*")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"{layer_class.__name__}: the state dict has 'blocks.0.0{new}") as error:
        load(net, renamed(unsettled(Net(layer_class)).state_dict(), ".conv_offset.", new), strict)
    assert "conv_offset" in str(error.value)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items() if "blocks" in key)


@both
def test_other_keys_beside_the_weight_are_an_error_too(layer_class):
    layer = layer_class(4, 6, 3, bias=False)
    for state in (nn.Conv2d(4, 6, 3).state_dict(), {"weight": layer.weight, "weight_orig": layer.weight}):
        with pytest.raises(RuntimeError, match=r"which would be lost\. This layer knows conv_offset, weight"):
            layer.load_state_dict(state, strict=False)


# Weights that are larger than the rigid one.

LIFTED = {
    "dk": (LocalDeformKernel2d, "lifted_weight", {}),
    "gdk": (GlobalDeformKernel2d, "lifted_weight", {}),
    "dkdconv": (DeformKernelConv2d, "lifted_weight", {}),
    "dkmdconv": (ModulatedDeformKernelConv2d, "lifted_weight", {}),
    "scc": (CondConv2d, "lifted_weight", dict(num_experts=3)),
    "dk, paper": (LocalDeformKernel2d, "scope_weight", dict(parametrisation="paper")),
}
lifted = pytest.mark.parametrize(("layer_class", "key", "options"), LIFTED.values(), ids=LIFTED.keys())


def learned(net):
    for child in net.modules():
        if isinstance(child, ZeroConv2d):
            nn.init.normal_(child.weight, std=0.3)
        elif isinstance(child, nn.Conv2d):
            nn.init.normal_(child.weight)
    return net


@lifted
def test_lifted_weights_name_themselves(layer_class, key, options):
    state = Net(layer_class, **options).state_dict()
    assert f"blocks.0.0.{key}" in state
    assert "blocks.0.0.weight" not in state
    assert "blocks.0.0.basis" not in state


@loaders
@pytest.mark.parametrize(("there", "here"), [("paper", "orthonormal"), ("orthonormal", "paper")])
@pytest.mark.parametrize("layer_class", [LocalDeformKernel2d, GlobalDeformKernel2d, ModulatedDeformKernelConv2d])
def test_either_parametrisation_loads_the_other(layer_class, load, there, here):
    net = learned(Net(layer_class, parametrisation=there)).double().eval()
    twin = Net(layer_class, parametrisation=here).double().eval()
    load(twin, net.state_dict(), True)
    x = torch.randn(2, 3, 9, 8).double()
    torch.testing.assert_close(twin(x), net(x))


def version_1(net):
    """The state dict that version 1 of the layers saved: the operator's weight, by the name of the parameter."""
    state = net.state_dict()
    for name, layer in net.named_modules():
        if hasattr(layer, "lift_weight"):
            experts = layer.experts().transpose(0, 1).flatten(1, 2) if isinstance(layer, CondConv2d) else None
            state[f"{name}.weight"] = layer.scope() if experts is None else experts
            del state[f"{name}.lifted_weight" if f"{name}.lifted_weight" in state else f"{name}.scope_weight"]
            state._metadata[name]["version"] = 1
    return state


@loaders
@lifted
@pytest.mark.parametrize("name", ["weight", "lifted_weight"], ids=["MMDetection", "Detectron2"])
def test_checkpoints_of_version_1(load, layer_class, key, options, name):
    net, twin = learned(Net(layer_class, **options)).double().eval(), Net(layer_class, **options).double().eval()
    state = version_1(net)
    for old in [old for old in state if old.startswith("blocks") and old.endswith("0.weight")]:
        state[old.removesuffix("weight") + name] = state.pop(old)
    load(twin, state, True)
    x = torch.randn(2, 3, 9, 8).double()
    torch.testing.assert_close(twin(x), net(x))


@lifted
def test_checkpoints_of_version_1_without_their_metadata_say_so(layer_class, key, options):
    state = dict(version_1(learned(Net(layer_class, **options))))
    message = rf"blocks.0.0.weight has shape .* of this layer's own is called {key}. Checkpoints of dk_detection 0.1"
    with pytest.raises(RuntimeError, match=message):
        Net(layer_class, **options).load_state_dict(state, strict=False)


@lifted
def test_missing_and_double_weights(layer_class, key, options):
    layer = layer_class(4, 6, 3, **options)
    state = layer.state_dict()
    del state[key]
    assert layer.load_state_dict(state, strict=False).missing_keys == [key]
    both_names = {**layer.state_dict(), "weight": nn.Conv2d(4, 6, 3).weight}
    with pytest.raises(RuntimeError, match=f"has both weight and {key}, expected one"):
        layer.load_state_dict(both_names)


def test_deformable_convolution_in_a_layer_with_a_deformable_kernel():
    """Its rigid weight is lifted, its offsets are taken, and what it does not have counts as missing."""
    source, layer = learned(DeformConv2d(4, 6, 3)).double(), learned(DeformKernelConv2d(4, 6, 3)).double()
    missing = layer.load_state_dict(source.state_dict(), strict=False).missing_keys
    assert missing == ["kernel_offset.weight", "kernel_offset.bias"]
    layer.kernel_offset.reset_parameters()
    x = torch.randn(2, 4, 9, 8).double()
    torch.testing.assert_close(layer(x), source(x))
