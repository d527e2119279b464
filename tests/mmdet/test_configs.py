"""Every config can be read and built, and is what its name says."""

import re
from pathlib import Path

import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from dk_detection.config_files import framework_of
from dk_detection.datasets import deformed_shapes
from dk_detection.layers.table import TABLE

ROOT = Path(__file__).parents[2] / "configs" / "mmdet"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "_base_")
LAYERS = {row.token: row.layer for row in TABLE}
CONVS, ROI_LAYERS = ([row.token for row in TABLE if row.kind == kind] for kind in ("conv", "roi"))
# Names of one layer with two deformations.
COMBINED = {"dk-mdconv": "dkdconv"}

# {detector}_{backbone}[-{token}-{stages}]_{neck}[_{RoI token}][_mimic[-{regions}]]_{schedule}_{dataset}; the
# backbones of Deformable Kernels are {backbone}[-{token}[-{stages}]][-{token}1x1].
STEM = re.compile(
    r"(?P<detector>faster-rcnn|mask-rcnn)_((?P<backbone>r\d+|x101-32x8d)"
    rf"(-(?P<token>{'|'.join([*CONVS, *COMBINED])})(-c(?P<first>\d))?-c(?P<last>\d))?"
    r"|(?P<dk_backbone>r50-dw|mobilenet-v2)(-(?P<conv3x3>dk|gdk|scc|(dk-)?dconv-c3-c5))?(-(?P<conv1x1>gdk|scc)1x1)?)"
    rf"_(?P<neck>fpn|dc5)(_(?P<roi>{'|'.join(ROI_LAYERS)}))?(?P<mimic>_mimic(-(?P<regions>bg|fgbg))?)?"
    r"_(?P<schedule>1x|16e|\d+(\.\d+)?k)_(?P<dataset>coco|deformed-shapes)"
)
# The first epoch at each lower rate.
MILESTONES = {"1x": [8, 11], "16e": [10, 14]}

configs = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_are_configs():
    assert {path.parent.name for path in FILES} == {"dcnv2", "deformed_shapes", "dk"}
    assert len({path.stem for path in FILES}) == len(FILES) >= 8


@configs
def test_config_is_what_its_name_says(path):
    name = STEM.fullmatch(path.stem)
    assert name, "the stem does not follow the grammar"
    assert framework_of(path) == "mmdet"
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == ["dk_detection.mmdet"]
    rates = {"conv_offset": 0.1} | ({"offset_fc": 0.01} if name["roi"] == "dpool" else {})
    if name["dataset"] == "deformed-shapes":
        rates |= {"kernel_offset": 0.1} | ({"offset_fc": 0.1} if name["roi"] else {})
    elif name["dk_backbone"]:  # Deformable Kernels, Section 4
        factor = {"r50-dw": 0.01, "mobilenet-v2": 0.1}[name["dk_backbone"]]
        rates = {"kernel_offset": factor, "conv_offset": factor}
        assert cfg.optim_wrapper.optimizer.weight_decay == 4e-5
    assert {key: value.lr_mult for key, value in cfg.optim_wrapper.paramwise_cfg.custom_keys.items()} == rates
    detector = {"faster-rcnn": "FasterRCNN", "mask-rcnn": "MaskRCNN"}[name["detector"]]
    assert cfg.model.type == ("DkMimicRCNN" if name["mimic"] else detector)
    assert ("mask_head" in cfg.model.roi_head) == (name["detector"] == "mask-rcnn")

    schedule = cfg.train_cfg
    if name["schedule"] in MILESTONES:
        assert schedule.max_epochs == {"1x": 12, "16e": 16}[name["schedule"]]
        assert cfg.param_scheduler[-1].milestones == MILESTONES[name["schedule"]]
    else:
        assert schedule.max_iters == 1000 * float(name["schedule"].removesuffix("k"))
    if name["schedule"] == "16e":  # Deformable ConvNets v2, Sections 3.2 and 5.1
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.lr, optimizer.weight_decay, optimizer.momentum) == (0.02, 1e-4, 0.9)
        assert (cfg.model.train_cfg.rpn_proposal.max_per_img, cfg.model.test_cfg.rpn.max_per_img) == (2000, 1000)
    last = cfg.param_scheduler[-1]
    assert last.end == schedule.get("max_epochs", schedule.get("max_iters"))

    dataset = cfg.train_dataloader.dataset
    assert dataset.type == "CocoDataset"
    if name["dataset"] == "coco":
        assert dataset.data_root == cfg.val_dataloader.dataset.data_root == "data/coco/"
        assert cfg.auto_scale_lr.base_batch_size == 16
    else:
        assert dataset.data_root == cfg.val_dataloader.dataset.data_root == "data/deformed_shapes/"
        assert cfg.model.roi_head.bbox_head.num_classes == len(dataset.metainfo.classes)
        assert dataset.metainfo.classes == cfg.val_dataloader.dataset.metainfo.classes == deformed_shapes.CLASSES
    for mode in ("val", "test"):
        loader = cfg[f"{mode}_dataloader"].dataset
        assert cfg[f"{mode}_evaluator"].ann_file == loader.data_root + loader.ann_file
        metric = cfg[f"{mode}_evaluator"].metric
        assert metric == (["bbox", "segm"] if name["detector"] == "mask-rcnn" else "bbox")

    init_default_scope("mmdet")
    with torch.device("meta"):  # no memory, no initial values
        model = MODELS.build(cfg.model)
    if name["mimic"]:
        regions = {None: "foreground", "bg": "background", "fgbg": "both"}[name["regions"]]
        assert (model.mimic.regions, model.mimic.reduction) == (regions, "mean")
        if name["dataset"] == "coco":  # as in Deformable ConvNets v2, Section 3.3
            settings = (model.mimic.max_rois, model.mimic.patch_size, model.mimic.mimic_weight, model.mimic.cls_weight)
            assert settings == (32, 224, 0.1, 0.1)
    net = model.backbone
    assert cfg.model.neck.type == {"fpn": "FPN", "dc5": "DkReduceLast"}[name["neck"]]
    if name["neck"] == "dc5":
        conv2 = [module for place, module in net.layer4.named_modules() if place.endswith("conv2")]
        assert all((conv.stride, conv.dilation) == ((1, 1), (2, 2)) for conv in conv2)
    heads = ["bbox", "mask"] if name["detector"] == "mask-rcnn" else ["bbox"]
    for head, size in zip(heads, (7, 14), strict=False):
        layers = getattr(model.roi_head, f"{head}_roi_extractor").roi_layers
        assert {type(layer) for layer in layers} == {LAYERS[name["roi"]] if name["roi"] else RoIAlign}
        assert {layer.output_size for layer in layers} == {(size, size)}
        assert name["schedule"] != "16e" or {layer.sampling_ratio for layer in layers} == {2}
    if name["dk_backbone"]:
        check_places_of_dk(name, net)
    else:
        check_places_of_dcn(name, net)


def check_places_of_dcn(name: re.Match, net: torch.nn.Module) -> None:
    assert net.depth == int(re.search(r"\d+", name["backbone"])[0])
    if name["backbone"] == "x101-32x8d":
        assert (type(net).__name__, net.groups, net.base_width) == ("ResNeXt", 32, 8)
    places = {token: [n for n, m in net.named_modules() if type(m) is layer] for token, layer in LAYERS.items()}
    expected = {token: [] for token in LAYERS}
    if name["token"]:
        stages = range(int(name["first"] or name["last"]) - 1, int(name["last"]))  # c3 is the output of layer2
        expected[COMBINED.get(name["token"], name["token"])] = [
            f"layer{stage}.{place}"
            for stage in stages
            for place, module in getattr(net, f"layer{stage}").named_modules()
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) and not place.endswith("_offset")
        ]
    assert places == expected


def check_places_of_dk(name: re.Match, net: torch.nn.Module) -> None:
    """Every convolution of the blocks is the layer that the stem names, in the paper's scope or with its experts."""
    if name["dk_backbone"] == "r50-dw":
        assert [len(getattr(net, f"layer{i}")) for i in (1, 2, 3, 4)] == [3, 4, 6, 3]
        conv2, pointwise = r"layer(\d)\.\d\.conv2", r"layer\d\.\d\.conv[13]"
        in_c3_to_c5, experts = range(2, 5), 2
    else:
        conv2, pointwise = r"features\.(\d+)\.conv\.[01]\.0", r"features\.\d+\.(conv\.[0-2](\.0)?|0)"
        in_c3_to_c5, experts = range(4, 18), 8
    rigid = {None: torch.nn.Conv2d} | LAYERS
    number = {"3x3": 0, "1x1": 0}
    for place, conv in net.named_modules():
        if not isinstance(conv, torch.nn.Conv2d) or place.endswith(("_offset", "routing")):
            continue
        if conv.kernel_size == (3, 3) and (match := re.fullmatch(conv2, place)):
            token, kind, scope = name["conv3x3"], "3x3", (4, 4)
            if token in ("dconv-c3-c5", "dk-dconv-c3-c5"):
                inside, outside = {"dconv-c3-c5": ("dconv", None), "dk-dconv-c3-c5": ("dkdconv", "dk")}[token]
                token = inside if int(match[1]) in in_c3_to_c5 else outside
            assert conv.groups == conv.in_channels == conv.out_channels
        elif conv.kernel_size == (1, 1) and re.fullmatch(pointwise, place):
            token, kind, scope = name["conv1x1"], "1x1", (2, 2)
        else:
            assert type(conv) is torch.nn.Conv2d, place
            continue
        assert type(conv) is rigid[token], place
        assert getattr(conv, "scope_size", scope) == scope
        assert getattr(conv, "num_experts", experts) == experts
        number[kind] += 1
    assert number == {"r50-dw": {"3x3": 16, "1x1": 32}, "mobilenet-v2": {"3x3": 17, "1x1": 34}}[name["dk_backbone"]]


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if any(STEM.fullmatch(p.stem)[part] for part in ("token", "roi", "mimic", "conv3x3", "conv1x1"))],
    ids=lambda path: path.stem,
)
def test_twins_differ_in_their_layers_only(path):
    name = STEM.fullmatch(path.stem)
    tokens = rf"-{name['token']}(-c\d)?-c\d|_{name['roi']}|_mimic(-[a-z]+)?|-{name['conv1x1']}1x1|-{name['conv3x3']}"
    twin = path.with_name(re.sub(tokens, "", path.name))
    assert twin.exists()
    ours, rigid = Config.fromfile(path), Config.fromfile(twin)
    ours.optim_wrapper.paramwise_cfg.custom_keys.pop("offset_fc", None)
    for key in (ours.keys() | rigid.keys()) - {"model", "roi_extractor"}:
        assert ours.get(key) == rigid.get(key), key
    if name["mimic"]:
        ours.model.type = rigid.model.type
        ours.model.pop("mimic", None)
    backbone = ours.model.backbone
    for option in ("dcn", "stage_with_dcn", "exchange", "conv3x3", "conv1x1"):
        backbone.pop(option, None)
    if backbone.type == "DkDeformable":
        backbone.type = backbone.pop("network")
    if name["roi"]:
        for key in ("bbox_roi_extractor", "mask_roi_extractor"):
            if extractor := ours.model.roi_head.get(key):
                extractor.type = rigid.model.roi_head[key].type
                extractor.roi_layer.type = rigid.model.roi_head[key].roi_layer.type
                for option in ("branch_size", "deform_fc_channels"):
                    extractor.roi_layer.pop(option, None)
    assert ours.model == rigid.model


@pytest.mark.parametrize(
    ("variable", "name"),
    [("DK_COCO_ROOT", "dcnv2/mask-rcnn_r50_fpn_1x_coco.py"), ("DK_DEFORMED_SHAPES_ROOT", "deformed_shapes")],
)
def test_data_root_from_the_environment(monkeypatch, variable, name):
    path = ROOT / name
    path = path if path.is_file() else next(path.glob("*.py"))
    for value in ("/some/where", "/some/where/"):
        monkeypatch.setenv(variable, value)
        cfg = Config.fromfile(path)
        paths = [cfg[f"{mode}_dataloader"].dataset.data_root for mode in ("train", "val", "test")]
        paths += [cfg[f"{mode}_evaluator"].ann_file for mode in ("val", "test")]
        assert all(path.startswith("/some/where/") for path in paths)
