"""The convolutions of the layer table in Detectron2's own networks, and rigid checkpoints in these."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.events import EventStorage
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

from dk_detection.detectron2 import DkDeformable, to_deformable
from dk_detection.layers import LocalDeformKernel2d, ModulatedDeformConv2d
from dk_detection.layers.table import TABLE
from tests.detectron2.small import HEIGHT, WIDTH, batch, detector
from tests.networks import EXACT

rows = pytest.mark.parametrize("row", [row for row in TABLE if row.kind == "conv"], ids=lambda row: row.token)
CONV2 = "backbone.bottom_up.res[345].*.conv2"
RESNEXT = ("MODEL.RESNETS.NUM_GROUPS", 4, "MODEL.RESNETS.STRIDE_IN_1X1", False)


def exchange(token: str, select=CONV2, **options) -> list[dict]:
    return [dict(layer=token, select=select, **options)]


def load(model, path) -> tuple:
    """Loads with Detectron2's checkpointer and returns what it finds wrong: missing, unexpected, incorrect shapes."""
    found = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = found.append
    checkpointer.load(str(path))
    return tuple(found[0])


def save(model, folder, name):
    DetectionCheckpointer(model, str(folder)).save(name)
    return folder / f"{name}.pth"


def assert_same_features(ours, expected, tolerance=1e-5):
    x = torch.rand(1, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        ours, expected = ours.eval()(x), expected.eval()(x)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert (ours[name] - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


@rows
def test_rigid_checkpoint(tmp_path, row):
    """Of the whole detector, and of the backbone alone in the model zoo's form, whose names lack a prefix."""
    rigid = detector(*RESNEXT)
    net = detector(*RESNEXT, exchange=exchange(row.token, **EXACT.get(row.token, {})))
    assert len([m for m in net.modules() if isinstance(m, row.layer)]) == 13
    assert load(net, save(rigid, tmp_path, "rigid")) == ([], [], [])
    assert_same_features(net.backbone, rigid.backbone)

    weights = {name: value.numpy() for name, value in rigid.backbone.bottom_up.state_dict().items()}
    weights["stem.fc.weight"] = weights["stem.conv1.weight"]
    content = {"model": weights, "__author__": "somebody", "matching_heuristics": True}
    (tmp_path / "backbone.pkl").write_bytes(pickle.dumps(content))
    net = detector(*RESNEXT, exchange=exchange(row.token, **EXACT.get(row.token, {})))
    missing, unexpected, shapes = load(net, tmp_path / "backbone.pkl")
    assert not any("bottom_up" in key for key in missing)
    assert (unexpected, shapes) == (["stem.fc.weight"], [])
    assert_same_features(net.backbone.bottom_up, rigid.backbone.bottom_up)


@rows
def test_own_checkpoint(tmp_path, row):
    net = detector(exchange=exchange(row.token))
    for layer in net.modules():
        if isinstance(layer, row.layer):
            for parameter in layer.parameters():
                parameter.data.normal_(std=0.1)
    again = detector(exchange=exchange(row.token))
    assert load(again, save(net, tmp_path, "own")) == ([], [], [])
    assert_same_features(again.backbone, net.backbone)
    again = copy.deepcopy(detector(exchange=exchange(row.token)))
    again.load_state_dict(net.state_dict())
    assert_same_features(again.backbone, net.backbone)


@pytest.mark.parametrize(("token", "modulated"), [("dconv", False), ("mdconv", True)])
def test_checkpoint_of_detectron2s_deformable_network(tmp_path, token, modulated):
    theirs = detector(
        *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]),
        *("MODEL.RESNETS.DEFORM_MODULATED", modulated),
    )
    weights = theirs.state_dict()
    for name in weights:
        if "conv2_offset" in name:
            weights[name].normal_(std=0.1)
    net = detector(exchange=exchange(token))
    assert load(net, save(theirs, tmp_path, "theirs")) == ([], [], [])
    ours = net.state_dict()
    for name, value in weights.items():
        assert ours[name.replace("conv2_offset", "conv2.conv_offset")].equal(value), name
    if not modulated:  # Detectron2 has no modulated deformable convolution for the CPU
        assert_same_features(net.backbone, theirs.backbone, 1e-4)  # the sums of 50 layers come in another order


@rows
def test_training_moves_the_branches(row):
    net = detector(exchange=exchange(row.token)).train()
    with EventStorage():
        losses = net(batch())
    sum(losses.values()).backward()
    layers = [m for m in net.modules() if isinstance(m, row.layer)]
    assert all(p.grad is not None and p.grad.isfinite().all() for layer in layers for p in layer.parameters())
    steering = [p for layer in layers for name, p in layer.named_parameters() if name not in ("weight", "bias")]
    assert any(p.grad.ne(0).any() for p in steering)
    with torch.no_grad():
        assert all(len(result["instances"]) for result in net.eval()(batch()))


def test_norm_of_a_frozen_convolution_learns_as_before():
    net = torch.nn.Sequential(Conv2d(4, 4, 3, padding=1, norm=torch.nn.BatchNorm2d(4)))
    net[0].weight.requires_grad_(False)
    to_deformable(net, "mdconv", select="0")
    learning = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert {name for name, learns in learning.items() if learns} == {"0.bias", "0.norm.weight", "0.norm.bias"}
    assert "0.conv_offset.weight" in learning


def test_frozen_stages_freeze_their_branches():
    net = detector(exchange=exchange("dk", "backbone.bottom_up.*.conv2"))  # FREEZE_AT is 2
    layers = {name: m for name, m in net.named_modules() if isinstance(m, LocalDeformKernel2d)}
    for name, layer in layers.items():
        assert {p.requires_grad for p in layer.parameters()} == {".res2." not in name}
    assert len(layers) == 16


def test_norm_and_activation_stay():
    net = torch.nn.Sequential(Conv2d(4, 6, 3, norm=torch.nn.BatchNorm2d(6), activation=torch.relu), Conv2d(6, 2, 1))
    x = torch.rand(2, 4, 9, 7)
    expected, names = net(x), list(net.state_dict())
    deformed = copy.deepcopy(net)
    assert to_deformable(deformed, "dconv", select=["0", "1"]) == ["0", "1"]
    net.eval(), deformed.eval()
    assert set(names) == {name for name in deformed.state_dict() if "conv_offset" not in name}
    torch.testing.assert_close(deformed(x), net(x))
    torch.testing.assert_close(copy.deepcopy(deformed)(x), net(x))
    assert not expected.equal(net(x))  # the normalisation is seen: training and evaluation differ
    FrozenBatchNorm2d.convert_frozen_batchnorm(deformed)  # what Detectron2 freezes a stage with
    assert isinstance(deformed[0].norm, FrozenBatchNorm2d)
    torch.testing.assert_close(deformed.train()(x), net(x))


def test_failed_exchange_leaves_the_network_as_it_was():
    net = torch.nn.Sequential(Conv2d(4, 6, 3, norm=torch.nn.BatchNorm2d(6), padding_mode="reflect"))
    modules = list(net.named_modules())
    with pytest.raises(ValueError, match=r"cannot exchange '0' \(Conv2d\)"):
        to_deformable(net, "dconv", select="0")
    assert list(net.named_modules()) == modules


def test_fpn_runs_what_was_exchanged():
    """It keeps its convolutions in lists besides."""
    net = detector(exchange=exchange("dconv", "backbone.fpn_output*"))
    layer = net.backbone.fpn_output3
    assert any(conv is layer for conv in net.backbone.output_convs)
    x = torch.rand(1, 3, HEIGHT, WIDTH)
    before = net.backbone(x)["p3"]
    layer.conv_offset.bias.data.fill_(0.4)
    assert not before.allclose(net.backbone(x)["p3"])


def resnet18():
    return LazyCall(FPN)(
        bottom_up=LazyCall(ResNet)(
            stem=LazyCall(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
            stages=[
                LazyCall(ResNet.make_stage)(
                    block_class=BasicBlock,
                    num_blocks=2,
                    stride_per_block=[stride, 1],
                    in_channels=fan_in,
                    out_channels=fan_out,
                )
                for stride, fan_in, fan_out in ((1, 8, 8), (2, 8, 16), (2, 16, 32))
            ],
            out_features=["res2", "res3", "res4"],
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=8,
    )


@pytest.mark.parametrize("many", [False, True])
def test_lazy_config_and_basic_blocks(many):
    one = dict(layer="mdconv", select="bottom_up.res[34].*.conv?", offset_groups=2)
    other = dict(layer="dk", select=["bottom_up.res2.*.conv1", "fpn_output2"], scope_size=[5, 4])
    net = instantiate(LazyCall(DkDeformable)(network=resnet18(), exchange=[one, other] if many else one))
    assert isinstance(net, FPN)
    layers = [m for m in net.modules() if isinstance(m, ModulatedDeformConv2d)]
    assert [layer.offset_groups for layer in layers] == [2] * 8
    assert net.fpn_output2.weight.shape[2:] == ((5, 4) if many else (3, 3))
    assert {name: tuple(x.shape[2:]) for name, x in net(torch.rand(1, 3, 64, 96)).items()} == {
        "p2": (16, 24),
        "p3": (8, 12),
        "p4": (4, 6),
    }


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(layer="dcn", select="*"), ValueError, "no layer has the token 'dcn'"),
        (dict(layer="mdconv", select="layer9.*"), ValueError, "matches no rigid nn.Conv2d"),
        (dict(layer="mdconv", select=CONV2, deform=1), TypeError, "deform"),
    ],
)
def test_wrong_exchange(settings, error, message):
    with pytest.raises(error, match=message):
        detector(exchange=[settings])


def test_flops_are_counted():
    rigid, net = detector(), detector(exchange=exchange("mdconv"))
    x = torch.rand(1, 3, HEIGHT, WIDTH)
    ours, theirs = (FlopCountAnalysis(model.backbone.bottom_up, x) for model in (net, rigid))
    branches = values = rigid_conv2 = offsets = 0
    for stage, positions in (("res3", 8 * 12), ("res4", 4 * 6), ("res5", 2 * 3)):
        for block in getattr(net.backbone.bottom_up, stage):
            branches += positions * block.conv2.conv_offset.weight.numel()
            rigid_conv2 += positions * block.conv2.weight.numel()
            values += positions * 9 * block.conv2.in_channels
            offsets += positions * block.conv2.conv_offset.out_channels
    # A value sampled bilinearly costs 2, its modulation 1.
    assert ours.by_operator()["deform_conv2d"] == rigid_conv2 + 3 * values
    assert ours.by_operator()["conv"] == theirs.by_operator()["conv"] - rigid_conv2 + branches
    assert not any("dk_detection" in name for name in ours.unsupported_ops())
    counts = [ActivationCountAnalysis(model.backbone.bottom_up, x).total() for model in (net, rigid)]
    assert counts[0] - counts[1] == offsets


@pytest.mark.parametrize("first", ["detectron2", "dk_detection.detectron2"])
def test_environment_module(first):
    code = (
        f"import {first}\nfrom detectron2.config import get_cfg\nfrom detectron2.modeling import META_ARCH_REGISTRY\n"
        "print(get_cfg().MODEL.DK.NETWORK, 'DkDeformable' in META_ARCH_REGISTRY)"
    )
    env = {**os.environ, "DETECTRON2_ENV_MODULE": "dk_detection.detectron2.env"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.stdout.split() == ["GeneralizedRCNN", "True"], done.stderr


def test_missing_detectron2_is_said():
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "try:\n import dk_detection.detectron2\nexcept ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("dk_detection.detectron2 needs Detectron2")
    assert "tutorials/install.html" in done.stdout
