"""The backbones as modules of MMEngine."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmengine.model import BaseModule

import dk_detection.mmdet  # noqa: F401
from dk_detection.backbones import AlignedInceptionResNet, MobileNetV2, ResNetDW
from dk_detection.layers._base import ZeroConv2d
from tests.networks import AIR, MOBILENET_V2, RESNET_DW, exchange_in

NETWORKS = {
    "DkResNetDW": (ResNetDW, dict(blocks=(1, 1, 1, 1)), RESNET_DW),
    "DkMobileNetV2": (MobileNetV2, dict(width_mult=0.25), MOBILENET_V2),
    "DkAlignedInceptionResNet": (AlignedInceptionResNet, dict(blocks=(1, 1, 1, 1)), AIR),
}
each = pytest.mark.parametrize("name", NETWORKS)


def build(name, **options):
    return MODELS.build(dict(type=name, **NETWORKS[name][1], **options))


def build_deformed(name, **options):
    exchange = exchange_in(NETWORKS[name][2], {"3x3": "dk", "1x1 in c3": "gdk"})
    return MODELS.build(dict(type="DkDeformable", network=name, exchange=exchange, **NETWORKS[name][1], **options))


def branches(net) -> list[ZeroConv2d]:
    return [m for m in net.modules() if isinstance(m, ZeroConv2d)]


@each
def test_registered_as_a_module_of_mmengine(name):
    net = build(name, norm_eval=True, frozen_stages=1, init_cfg=None)
    assert isinstance(net, NETWORKS[name][0])
    assert isinstance(net, BaseModule)
    net.init_weights()
    assert net.is_init
    assert [tuple(x.shape[2:]) for x in net(torch.rand(1, 3, 64, 96))] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@each
def test_without_init_cfg_the_weights_are_torchvisions(name):
    net = build_deformed(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@each
def test_layers_are_at_rest_after_an_initialiser(name):
    net = build_deformed(name, init_cfg=[dict(type="Kaiming", layer="Conv2d")])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.init_weights()
    assert branches(net)
    assert all(p.eq(0).all() for branch in branches(net) for p in branch.parameters())
    lifted = [key for key in before if key.endswith("lifted_weight")]
    assert lifted
    assert not any(torch.equal(net.state_dict()[key], before[key]) for key in lifted)


@each
@pytest.mark.parametrize("more", [[], [dict(type="Kaiming", layer="Conv2d")]], ids=["alone", "with an initialiser"])
def test_pretrained(tmp_path, name, more):
    rigid, learned = build(name), build_deformed(name)
    for branch in branches(learned):
        nn.init.normal_(branch.weight)
    for stem, source in (("rigid", rigid), ("learned", learned)):
        torch.save(dict(state_dict=source.state_dict()), tmp_path / f"{stem}.pth")
        checkpoint = dict(type="Pretrained", checkpoint=str(tmp_path / f"{stem}.pth"))
        net = build_deformed(name, init_cfg=[checkpoint, *more] if more else checkpoint)
        net.init_weights()
        x = torch.rand(1, 3, 64, 96)
        with torch.no_grad():
            for ours, expected in zip(net.eval()(x), source.eval()(x), strict=True):
                assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
