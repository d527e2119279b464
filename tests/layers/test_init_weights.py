"""Frameworks initialise every convolution of a network; offset branches have to come out of that at rest."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from fvcore.nn.weight_init import c2_msra_fill  # Detectron2's
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmdet.models.backbones import ResNet, ResNeXt
from mmengine.model import initialize

from dk_detection.layers import (
    DeformConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    ModulatedDeformConv2d,
    ModulatedDeformKernelConv2d,
)
from dk_detection.ops import resample_kernel

LAYERS = {
    "dk_detection.layers.DeformConv2d": DeformConv2d,
    "dk_detection.layers.ModulatedDeformConv2d": ModulatedDeformConv2d,
}
both = pytest.mark.parametrize(("path", "layer_class"), LAYERS.items(), ids=LAYERS.keys())


def backbone(dcn=None, backbone_class=ResNet, **kwargs):
    dcn_stages = dict(dcn=dcn, stage_with_dcn=(False, True, True, True)) if dcn else {}
    return backbone_class(depth=50, base_channels=8, stem_channels=8, **dcn_stages, **kwargs)


def layers_of(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, tuple(LAYERS.values()))}


@both
@pytest.mark.parametrize("init_cfg", [None, dict(type="Kaiming", layer="Conv2d"), dict(type="Normal", layer="Conv2d")])
def test_offsets_are_zero_after_init_weights(path, layer_class, init_cfg):
    net = backbone(dcn=dict(type=path, offset_groups=2), init_cfg=init_cfg)
    net.init_weights()
    layers = layers_of(net)
    assert len(layers) == 4 + 6 + 3
    for name, layer in layers.items():
        assert type(layer) is layer_class
        assert name.endswith("conv2")
        assert layer.conv_offset.weight.eq(0).all(), name
        assert layer.conv_offset.bias.eq(0).all(), name


@both
@pytest.mark.parametrize("kind", ["Kaiming", "Normal", "Xavier", "Uniform", "TruncNormal"])
def test_initialisers_pass_offset_branches_by(path, layer_class, kind):
    """In a container of torch's MMEngine finds no `init_weights` to call afterwards."""
    net = nn.Sequential(nn.Sequential(layer_class(4, 6, 3)))
    before = net[0][0].weight.clone()
    initialize(net, dict(type=kind, layer="Conv2d", bias=1))
    assert net[0][0].weight.ne(before).any()
    assert all(p.eq(0).all() for p in net[0][0].conv_offset.parameters())


@both
def test_weights_are_initialised_like_those_of_the_other_convolutions(path, layer_class):
    net = backbone(dcn=dict(type=path))
    net.init_weights()
    weight = net.layer4[0].conv2.weight  # [64, 64, 3, 3]
    # mmdet's ResNet asks for Kaiming's normal distribution, fan_out; nn.Conv2d's own is 0.4 as wide.
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)


@both
def test_rigid_checkpoint_through_pretrained(path, layer_class, tmp_path):
    rigid = backbone()
    rigid.init_weights()
    for m in rigid.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
    torch.save(rigid.state_dict(), tmp_path / "rigid.pth")
    net = backbone(
        dcn=dict(type=path, offset_groups=2),
        init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "rigid.pth")),
    )
    net.init_weights()
    rigid.eval()
    net.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, expected in zip(net(x), rigid(x), strict=True):
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@both
def test_resnext_and_frozen_stages(path, layer_class):
    net = backbone(dict(type=path), ResNeXt, groups=4, base_width=16, frozen_stages=2)
    net.init_weights()
    layers = layers_of(net)
    assert all(layer.groups == 4 and layer.conv_offset.groups == 1 for layer in layers.values())
    net.train()
    net(torch.randn(1, 3, 64, 64))[-1].sum().backward()
    for name, layer in layers.items():
        learns = not name.startswith("layer2")
        assert all((p.grad is not None) == learns for p in layer.parameters()), name


@both
def test_conv_module(path, layer_class):
    module = ConvModule(4, 6, 3, padding=1, conv_cfg=dict(type=path), norm_cfg=dict(type="BN"))
    assert type(module.conv) is layer_class
    assert module.conv.conv_offset.weight.eq(0).all()


@both
def test_fused_batch_norm_keeps_the_output(path, layer_class):
    net = nn.Sequential(layer_class(4, 6, 3, padding=1), nn.BatchNorm2d(6)).eval()
    nn.init.normal_(net[0].conv_offset.weight, std=0.1)
    nn.init.uniform_(net[1].running_mean)
    nn.init.uniform_(net[1].weight, 0.5, 2)
    x = torch.randn(2, 4, 7, 8)
    expected = net(x)
    torch.testing.assert_close(fuse_conv_bn(net)(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(net[1], nn.Identity)


def draw_with_torch(layer):
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def draw_with_mmengine(layer):
    initialize(nn.Sequential(layer), dict(type="Kaiming", layer="Conv2d", mode="fan_out", nonlinearity="relu"))


@pytest.mark.parametrize("draw", [draw_with_torch, draw_with_mmengine, c2_msra_fill])
@pytest.mark.parametrize("layer_class", [LocalDeformKernel2d, GlobalDeformKernel2d, ModulatedDeformKernelConv2d])
@pytest.mark.parametrize(("kernel", "scope"), [(3, 4), (3, 5), ((3, 1), (4, 2)), (1, 2), (3, 9)], ids=str)
def test_initialisers_draw_a_kernel_of_independent_taps(draw, layer_class, kernel, scope):
    """As strong as the initialiser makes a weight whose fan is counted over the cells of the scope."""
    layer = layer_class(64, 96, kernel, scope_size=scope, bias=False)
    draw(layer)
    rest = torch.zeros(1, 2 * layer.kernel_size[0] * layer.kernel_size[1])
    at_rest = resample_kernel(layer.scope().detach(), rest, kernel_size=kernel)[0] / layer._gain
    taps, cells = at_rest[0, 0].numel(), layer.weight[0, 0].numel()
    assert at_rest.std().item() == pytest.approx(math.sqrt(2 / (96 * cells)), rel=0.05)
    correlation = at_rest.flatten(2).flatten(0, 1).T.corrcoef().reshape(taps, taps)
    assert (correlation - torch.eye(taps)).abs().max() < 0.1
    assert all(p.eq(0).all() for branch in layer.children() for p in branch.parameters())
