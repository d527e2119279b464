"""Aligned-Inception-ResNet: Appendix B of Deformable ConvNets (2017)."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dk_detection import to_deformable
from dk_detection.backbones import AlignedInceptionResNet
from dk_detection.backbones.aligned_inception_resnet import InceptionResidualBlock
from dk_detection.layers import DeformConv2d
from dk_detection.layers._base import ZeroConv2d
from tests.networks import AIR, settled

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = dict(blocks=(1, 1, 1, 2))


def test_stages_are_those_of_the_paper():
    """Table 6: the map behind each stage of an image of 224x224, and how many blocks there are."""
    with torch.device("meta"):
        net = AlignedInceptionResNet(1000)
        image = torch.rand(1, 3, 224, 224)
    seen = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output.shape[1:]}))
    assert net(image).shape == (1, 1000)
    assert seen["conv1"] == (64, 112, 112)
    assert seen["maxpool"] == (64, 56, 56)
    assert (net.conv1.kernel_size, net.maxpool.kernel_size) == ((7, 7), 3)
    for name, blocks, shape in (
        ("layer1", 3, (256, 56, 56)),
        ("layer2", 4, (512, 28, 28)),
        ("layer3", 23, (1024, 14, 14)),
        ("layer4", 3, (2048, 7, 7)),
    ):
        stage = net.get_submodule(name)
        assert (len(stage), seen[name]) == (blocks, shape)
        assert all(isinstance(block, InceptionResidualBlock) for block in stage)
    assert net.out_channels == (256, 512, 1024, 2048)


def test_parameters_are_those_of_the_paper():
    """Table 7 says 64.3M; without normalisations it is 64.25M, with them 64.38M."""
    with torch.device("meta"):
        net = AlignedInceptionResNet(1000)
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == 64_381_800
    assert round((parameters - norms) / 1e6, 1) == 64.3


def test_block_is_what_its_docstring_says():
    """Against the formula, written out with functions."""
    block = settled(InceptionResidualBlock(16, 4))
    x = torch.randn(2, 16, 7, 9)

    def normal(y, norm):
        return nn.functional.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    def conv(y, layer, padding=0):
        return nn.functional.conv2d(y, layer.weight, padding=padding)

    with torch.no_grad():
        first = conv(normal(conv(x, block.reduce1), block.bn_reduce1).relu(), block.conv1, 1)
        second = normal(conv(x, block.reduce2), block.bn_reduce2).relu()
        second = conv(normal(conv(second, block.conv2, 1), block.bn2).relu(), block.conv3, 1)
        assert (first.shape[1], second.shape[1]) == (4, 2)
        inner = normal(torch.cat((first, second), 1), block.bn_concat).relu()
        expected = (normal(conv(inner, block.expand), block.bn_expand) + x).relu()
        assert torch.equal(block(x.clone()), expected)


def test_a_map_cell_is_centred_on_its_receptive_field():
    """What "aligned" means: what a cell of stride s reads lies around its own place on the image, to half a cell."""
    net = AlignedInceptionResNet(blocks=(1, 1, 1, 1), out_indices=(0, 1, 2)).eval()
    for conv in filter(lambda m: isinstance(m, nn.Conv2d), net.modules()):
        nn.init.constant_(conv.weight, 1 / conv.weight[0].numel())
    size = 256
    image = torch.ones(1, 3, size, size)
    # Where all values are alike the first of a window is its maximum: a slope makes it the last, another time.
    touched = {stride: torch.zeros(size, dtype=torch.bool) for stride in net.out_strides}
    for sign in (1, -1):
        sloped = (image + sign * 1e-3 * torch.arange(size)[:, None]).requires_grad_()
        for stride, feature in zip(net.out_strides, net(sloped), strict=True):
            middle = size // stride // 2
            (gradient,) = torch.autograd.grad(feature[0, 0, middle, middle], sloped, retain_graph=True)
            touched[stride] |= gradient[0].ne(0).any(0).any(1)
    for stride, rows in touched.items():
        first, last = rows.nonzero()[[0, -1], 0].tolist()
        assert abs((first + last) / 2 - size // stride // 2 * stride) <= stride / 2


def test_dilated_conv5():
    """Section 2.3: stride 16, dilation 2 in every filter above 1x1 of conv5; the weights are the same."""
    net, plain = AlignedInceptionResNet(dilated_c5=True, **SMALL), settled(AlignedInceptionResNet(**SMALL))
    net.load_state_dict(plain.state_dict(), strict=True)
    assert net.out_strides == (4, 8, 16, 16)
    for conv in filter(lambda m: isinstance(m, nn.Conv2d), net.layer4.modules()):
        dilation = (2, 2) if conv.kernel_size == (3, 3) else (1, 1)
        assert (conv.stride, conv.dilation) == ((1, 1), dilation)
    others = [m for part in net._parts()[:-1] for stage in part for m in stage.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.dilation == (1, 1) for conv in others)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, expected = net.eval()(image), plain(image)
    assert [x.shape[2:] for x in ours] == [(16, 24), (8, 12), (4, 6), (4, 6)]
    assert all(torch.equal(x, y) for x, y in zip(ours[:3], expected[:3], strict=True))


@pytest.mark.parametrize("dilated_c5", [False, True])
def test_exchange_at_rest_is_exact(dilated_c5):
    """In float64, where the order of the sums does not show."""
    net = settled(AlignedInceptionResNet(dilated_c5=dilated_c5, **SMALL)).double()
    image = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = net(image)
        assert len(to_deformable(net, "dconv", select=AIR["3x3 in c5"])) == 6
        assert sum(isinstance(m, DeformConv2d) for m in net.modules()) == 6
        for ours, rigid in zip(net(image), expected, strict=True):
            assert (ours - rigid).abs().max() <= 1e-12 * rigid.abs().max()
        for branch in filter(lambda m: isinstance(m, ZeroConv2d), net.modules()):
            nn.init.normal_(branch.weight, std=0.1)
        assert not torch.allclose(net(image)[-1], expected[-1], rtol=1e-3)


@pytest.mark.parametrize("blocks", [(3, 4, 6), (3, 4, 0, 3)])
def test_wrong_blocks(blocks):
    with pytest.raises(ValueError, match="AlignedInceptionResNet: blocks must be four numbers of at least 1, got"):
        AlignedInceptionResNet(blocks=blocks)


def test_wrong_block():
    with pytest.raises(ValueError, match="InceptionResidualBlock: groups must be 1 and base_width 64, got 2, 64"):
        InceptionResidualBlock(16, 4, groups=2)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """What DkBackboneHook leaves of a small classifier, for the configs to start from; its weights."""
    net = settled(AlignedInceptionResNet(blocks=(1, 1, 1, 1)))
    torch.save(net.state_dict(), tmp_path / "backbone.pth")
    monkeypatch.setenv("DK_AIR_CHECKPOINT", str(tmp_path / "backbone.pth"))
    return net.state_dict()


def same_weights(backbone: nn.Module, weights: dict) -> None:
    own = {key: value for key, value in backbone.state_dict().items() if "conv_offset" not in key}
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[key], weights[key]) for key in own)


def test_a_detector_of_mmdet_starts_from_the_classifier(checkpoint):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    import dk_detection.mmdet  # noqa: F401

    cfg = Config.fromfile(CONFIGS / "mmdet/dcnv1/rfcn_air-dconv-c5_dc5_dpspool_240k_coco.py")
    with DefaultScope.overwrite_default_scope("mmdet"):
        backbone = MODELS.build({**cfg.model.backbone, "blocks": (1, 1, 1, 1)})
        backbone.init_weights()
    same_weights(backbone, checkpoint)


def test_a_detector_of_detectron2_starts_from_the_classifier(checkpoint):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate

    cfg = LazyConfig.load(str(CONFIGS / "detectron2/dcnv1/faster-rcnn_air-dconv-c5_dc5_dpool_240k_coco.py"))
    cfg.model.network.backbone.bottom_up.blocks = (1, 1, 1, 1)
    detector = instantiate(cfg.model)
    DetectionCheckpointer(detector).load(cfg.train.init_checkpoint)
    same_weights(detector.backbone.bottom_up, checkpoint)


def test_fpn_by_yaml():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from dk_detection.detectron2 import DkAlignedInceptionResNet, add_dk_config

    cfg = get_cfg()
    add_dk_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DK.BACKBONE = "build_dk_fpn_backbone", "aligned-inception-resnet"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    with torch.device("meta"):
        fpn = build_backbone(cfg)
    assert isinstance(fpn.bottom_up, DkAlignedInceptionResNet)
    assert fpn.bottom_up.frozen_stages == cfg.MODEL.BACKBONE.FREEZE_AT - 1
    assert [shape.stride for shape in fpn.output_shape().values()] == [4, 8, 16, 32, 64]
