"""The rows of the layer table in MMDetection's own networks."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, get_model_complexity_info
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import InstanceData

import dk_detection.mmdet
from dk_detection.layers import DeformConv2d, LocalDeformKernel2d, ModulatedDeformConv2d
from dk_detection.layers.table import TABLE
from tests.networks import EXACT

ROWS = [row for row in TABLE if row.kind == "conv"]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.token)
# The layers that move the data, whose branch is `conv_offset`.
DATA_ROWS = [row for row in ROWS if issubclass(row.layer, (DeformConv2d, ModulatedDeformConv2d))]
data_rows = pytest.mark.parametrize("row", DATA_ROWS, ids=lambda row: row.token)

# What a user writes: the two lines, over mmdet's own model. The rest makes it small.
USER_CONFIG = """
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
custom_imports = dict(imports=['dk_detection.mmdet'])
model = dict(
    backbone=dict(
        dcn=dict(type='{name}', offset_groups=1), stage_with_dcn=(False, True, True, True),
        base_channels=8, stem_channels=8, init_cfg=None, norm_eval=False, frozen_stages=-1),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=2)))
"""


def user_config(tmp_path, row) -> Config:
    path = tmp_path / "user.py"
    path.write_text(USER_CONFIG.format(name=row.name), encoding="utf-8")
    return Config.fromfile(path)


def backbone(**options):
    return MODELS.build(dict(type="ResNet", depth=50, base_channels=8, stem_channels=8, **options))


def dcn(row, **options):
    return dict(dcn=dict(type=row.name, **options), stage_with_dcn=(False, True, True, True))


def test_configs_of_this_project_are_bases():
    """By the name of the package, as MMDetection's; what they set is built in its scope."""
    stem = "dk_detection::deformed_shapes/mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes.py"
    cfg = Config.fromstring(f"_base_ = '{stem}'\nmodel = dict(mimic=dict(max_rois=3))", ".py")
    with torch.device("meta"):
        detector = MODELS.build(cfg.model)
    assert isinstance(detector, dk_detection.mmdet.DkMimicRCNN) and detector.mimic.max_rois == 3
    dict_of_ours = dict(type="DkModulatedDeformConv2d", in_channels=2, out_channels=2, kernel_size=3)
    assert isinstance(MODELS.build(dict(dict_of_ours, _scope_="dk_detection")), ModulatedDeformConv2d)


@data_rows
def test_two_lines_train_a_detector(tmp_path, row):
    cfg = user_config(tmp_path, row)
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model)
    model.init_weights()
    layers = {name: m for name, m in model.named_modules() if type(m) is row.layer}
    assert list(layers) == [
        f"backbone.layer{s}.{i}.conv2" for s, blocks in ((2, 4), (3, 6), (4, 3)) for i in range(blocks)
    ]
    for layer in layers.values():
        assert all(parameter.eq(0).all() for parameter in layer.conv_offset.parameters())

    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0), pad_shape=(64, 96))
    )
    masks = torch.zeros(1, 64, 96)
    masks[:, 10:50, 20:70] = 1
    instances = InstanceData(
        bboxes=torch.tensor([[20.0, 10.0, 70.0, 50.0]]), labels=torch.tensor([1]), masks=_bitmap(masks)
    )
    sample.gt_instances, sample.ignored_instances = (
        instances,
        InstanceData(bboxes=torch.empty(0, 4), labels=torch.empty(0)),
    )
    wrapper = build_optim_wrapper(model, dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01)))
    data = dict(inputs=[torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)], data_samples=[sample])
    model.train()
    for _ in range(2):  # at the first step blocks are behind a normalisation that starts at zero
        log = model.train_step(data, wrapper)
        assert all(value.isfinite().all() for value in log.values())
    for layer in layers.values():
        assert layer.conv_offset.weight.ne(0).any()
    model.eval()
    with torch.no_grad():
        assert len(model.test_step(data)) == 1


def _bitmap(masks):
    from mmdet.structures.mask import BitmapMasks

    return BitmapMasks(masks.numpy(), *masks.shape[1:])


@rows
def test_registered_where_mmdet_and_mmcv_look(row):
    for registry in (MODELS, ROOT_MODELS):
        assert row.name in registry
    assert isinstance(ROOT_MODELS.build(dict(type=row.name, in_channels=4, out_channels=6, kernel_size=3)), row.layer)


@pytest.mark.parametrize("scope", [None, "mmdet", "mmpretrain"])
def test_names_with_a_scope(scope):
    if scope == "mmpretrain":
        pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")
    exchange = dict(layer="dk", select="layer4.*.conv2")
    with DefaultScope.overwrite_default_scope(scope):
        net = MODELS.build(
            dict(type="mmdet.DkDeformable", network="mmdet.DkResNetDW", blocks=(1, 1, 1, 1), exchange=exchange)
        )
    assert isinstance(net, dk_detection.mmengine.DkResNetDW)
    assert isinstance(net.layer4[0].conv2, LocalDeformKernel2d)


def test_network_of_another_framework():
    backbones = pytest.importorskip("mmpretrain.models.backbones", reason="MMPretrain is not installed")
    exchange = dict(layer="mdconv", select="layer4.*.conv2")
    with DefaultScope.overwrite_default_scope("mmdet"):
        net = MODELS.build(dict(type="DkDeformable", network="mmpretrain.ResNet", depth=18, exchange=exchange))
    assert type(net) is backbones.ResNet


def test_import_may_be_repeated():
    importlib.reload(dk_detection.mmdet)
    importlib.reload(dk_detection.mmengine)
    assert "DkModulatedDeformConv2d" in MODELS


@pytest.mark.parametrize("name", ["deform_groups", "deformable_groups"])
@data_rows
def test_mmcvs_names_of_offset_groups_are_understood(row, name):
    net = backbone(**dcn(row, **{name: 2}, fallback_on_stride=False))
    assert net.layer2[0].conv2.offset_groups == 2
    with pytest.raises(TypeError, match=f"{row.name}: {name} is another name of offset_groups"):
        backbone(**dcn(row, **{name: 2}, offset_groups=2))
    with pytest.raises(TypeError, match="deform_group'"):
        backbone(**dcn(row, deform_group=2))


def test_a_layer_without_offset_groups_takes_the_default_of_mmdets_configs():
    row = next(row for row in ROWS if row.token == "dk")
    assert isinstance(backbone(**dcn(row, deform_groups=1)).layer2[0].conv2, LocalDeformKernel2d)
    with pytest.raises(TypeError, match="DkLocalDeformKernel2d: deform_groups must be 1, as this layer has no offset"):
        backbone(**dcn(row, deform_groups=2))


@data_rows
def test_resnext(row):
    net = MODELS.build(
        dict(
            type="ResNeXt",
            depth=50,
            base_channels=8,
            stem_channels=8,
            groups=4,
            base_width=16,
            **dcn(row, offset_groups=2),
        )
    )
    assert isinstance(net, ResNeXt)
    assert net.layer2[0].conv2.groups == 4
    assert net.layer2[0].conv2.conv_offset.groups == 1
    assert [tuple(x.shape[2:]) for x in net(torch.rand(1, 3, 64, 96))] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@data_rows
def test_learning_rate_of_offset_branches(row):
    cfg = Config.fromfile(Path(__file__).parents[2] / "configs" / "mmdet" / "_base_" / "schedule_1x.py")
    net = backbone(**dcn(row))
    wrapper = build_optim_wrapper(net, cfg.optim_wrapper)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == names_of_learning(net)
    base = cfg.optim_wrapper.optimizer.lr
    for name, rate in rates.items():
        assert rate == pytest.approx(base * (0.1 if "conv_offset" in name else 1)), name
    assert any("conv_offset" in name for name in rates)


def names_of_learning(net) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


@data_rows
def test_flops_are_counted(row):
    rigid, net = backbone(), backbone(**dcn(row))
    x = torch.rand(1, 3, 64, 96)
    ours, theirs = FlopAnalyzer(net, x), FlopAnalyzer(rigid, x)
    value_costs = 3 if row.token == "mdconv" else 2  # a value sampled bilinearly costs 2, its modulation 1
    branches = values = rigid_conv2 = 0
    shapes = {2: (8, 12), 3: (4, 6), 4: (2, 3)}
    for stage, blocks in ((2, net.layer2), (3, net.layer3), (4, net.layer4)):
        positions = shapes[stage][0] * shapes[stage][1]
        for block in blocks:
            branches += positions * block.conv2.conv_offset.weight.numel()
            rigid_conv2 += positions * block.conv2.weight.numel()
            values += positions * 9 * block.conv2.in_channels
    assert ours.by_operator()["deform_conv2d"] == rigid_conv2 + value_costs * values
    assert ours.by_operator()["conv"] == theirs.by_operator()["conv"] - rigid_conv2 + branches
    activations = ActivationAnalyzer(net, x), ActivationAnalyzer(rigid, x)
    offset_channels = net.layer2[0].conv2.conv_offset.out_channels
    assert activations[0].total() - activations[1].total() == offset_channels * (4 * 96 + 6 * 24 + 3 * 6)
    report = get_model_complexity_info(net, (3, 64, 96), show_table=False, show_arch=False)
    assert report["flops"] == ours.total() > theirs.total()
    assert not any("dk_detection" in name for name in ours.unsupported_ops())


# Networks without a slot.

PLACES = {
    "ResNet-18": (dict(network="ResNet", depth=18), "layer[234].*.conv2", 6),
    "ResNet-50, 1x1": (dict(network="ResNet", depth=50, base_channels=8, stem_channels=8), "layer4.*.conv[13]", 6),
    "MobileNetV2": (dict(network="MobileNetV2"), "layer[67].*.depthwise_conv.conv", 4),
    "FPN": (dict(network="FPN", in_channels=[8, 16], out_channels=8, num_outs=2), "fpn_convs.*.conv", 2),
}


@rows
@pytest.mark.parametrize(("options", "select", "number"), PLACES.values(), ids=PLACES.keys())
def test_any_network(tmp_path, row, options, select, number):
    options = dict(options)
    rigid = MODELS.build(dict(type=options.pop("network"), **options))
    rigid.init_weights()
    for module in rigid.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    torch.save(dict(state_dict=rigid.state_dict()), tmp_path / "rigid.pth")
    net = MODELS.build(
        dict(
            type="DkDeformable",
            network=type(rigid).__name__,
            exchange=[dict(layer=row.token, select=select, **EXACT.get(row.token, {}))],
            **options,
            init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "rigid.pth")),
        )
    )
    assert type(net) is type(rigid)
    assert len([m for m in net.modules() if isinstance(m, row.layer)]) == number
    net.init_weights()
    rigid.eval()
    net.eval()
    x = [torch.rand(1, 8, 16, 24), torch.rand(1, 16, 8, 12)] if options.get("in_channels") else torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(net(x), rigid(x), strict=True):
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_offset_branches_are_at_rest_without_a_checkpoint():
    net = MODELS.build(
        dict(type="DkDeformable", network="ResNet", depth=18, exchange=dict(layer="mdconv", select="*.conv2"))
    )
    net.init_weights()
    layers = [m for m in net.modules() if isinstance(m, ModulatedDeformConv2d)]
    assert len(layers) == 8
    assert all(p.eq(0).all() for layer in layers for p in layer.conv_offset.parameters())


def test_deformable_kernels_inside_containers_are_drawn_as_rigid_ones():
    exchange = [dict(layer="dk", select="layer[67].*.depthwise_conv.conv")]
    net = MODELS.build(dict(type="DkDeformable", network="MobileNetV2", exchange=exchange))
    layers = [m for m in net.modules() if isinstance(m, LocalDeformKernel2d)]
    before = [layer.weight.clone() for layer in layers]
    net.init_weights()
    assert len(layers) == 4
    for layer, old in zip(layers, before, strict=True):
        assert not torch.equal(layer.weight, old)  # MMEngine has drawn it
        assert all(p.eq(0).all() for p in layer.kernel_offset.parameters())


@pytest.mark.parametrize("kind", ["backbone", "detector"])
def test_what_was_loaded_or_learned_stays(tmp_path, kind):
    """`init_weights` of a network whose deformable layers have learned something, from a checkpoint."""
    exchange = [dict(layer="dk", select="layer[34].*.conv2"), dict(layer="mdconv", select="layer2.*.conv2")]
    settings = dict(type="DkDeformable", network="ResNet", depth=18, base_channels=8, stem_channels=8)
    learned = MODELS.build(dict(settings, exchange=exchange))
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(dict(state_dict=learned.state_dict()), tmp_path / "learned.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "learned.pth"))
    backbone = dict(settings, exchange=exchange, init_cfg=pretrained)
    if kind == "detector":
        head = dict(type="RetinaHead", num_classes=2, in_channels=64, feat_channels=8, stacked_convs=1)
        net = MODELS.build(dict(type="SingleStageDetector", backbone=backbone, bbox_head=head))
        net.init_weights()
        net = net.backbone
    else:
        net = MODELS.build(backbone)
        net.init_weights()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in learned.state_dict().items())


def test_two_exchanges_and_options():
    net = MODELS.build(
        dict(
            type="DkDeformable",
            network="ResNet",
            depth=18,
            exchange=[
                dict(layer="dconv", select="layer3.*.conv2"),
                dict(layer="mdconv", select="layer[34].*.conv2", offset_groups=4),
            ],
        )
    )
    assert [type(stage[0].conv2).__name__ for stage in (net.layer2, net.layer3, net.layer4)] == [
        "Conv2d",
        "DeformConv2d",
        "ModulatedDeformConv2d",
    ]
    assert net.layer4[0].conv2.offset_groups == 4


@pytest.mark.parametrize("how", ["exchange", "dcn"])
def test_frozen_stages_freeze_their_branches(how):
    settings = dict(type="ResNet", depth=50, base_channels=8, stem_channels=8, frozen_stages=2)
    if how == "exchange":
        exchange = [dict(layer="dk", select="layer*.conv2")]
        settings.update(type="DkDeformable", network="ResNet", exchange=exchange)
    else:
        settings.update(dcn=dict(type="DkLocalDeformKernel2d"), stage_with_dcn=(True,) * 4)
    net = MODELS.build(settings)
    net.train()
    layers = {name: m for name, m in net.named_modules() if isinstance(m, LocalDeformKernel2d)}
    for name, layer in layers.items():
        assert {p.requires_grad for p in layer.parameters()} == {name.startswith(("layer3", "layer4"))}, name
    assert len(layers) == 16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(exchange=dict(layer="dcn", select="*")), ValueError, "no layer has the token 'dcn'"),
        (dict(exchange=dict(layer="dk")), ValueError, r"exchange needs select=\.\.\. in \{'layer': 'dk'\}"),
        (
            dict(exchange="mdconv"),
            TypeError,
            r"exchange must be dict\(layer=\.\.\., select=\.\.\.\) or several of them",
        ),
        (dict(exchange=dict(layer="mdconv", select="layer9.*")), ValueError, "matches no rigid nn.Conv2d"),
        (dict(exchange=dict(layer="mdconv", select="*", deform=1)), TypeError, "deform"),
    ],
)
def test_wrong_exchange(options, error, message):
    with pytest.raises(error, match=message):
        MODELS.build(dict(type="DkDeformable", network="ResNet", depth=18, **options))


def test_missing_mmdet_is_said():
    code = (
        "import sys; sys.modules['mmdet'] = None\ntry:\n import dk_detection.mmdet\nexcept ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("dk_detection.mmdet needs MMDetection 3")
    assert "pip install" in done.stdout


def test_old_mmdet_is_said(tmp_path):
    (tmp_path / "mmdet").mkdir()
    (tmp_path / "mmdet" / "__init__.py").write_text("__version__ = '2.28.2'")
    code = "try:\n import dk_detection.mmdet\nexcept ImportError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.startswith("dk_detection.mmdet needs MMDetection 3"), done.stderr


def test_resnet_is_mmdets_own():
    assert type(backbone(**dcn(ROWS[0]))) is ResNet
