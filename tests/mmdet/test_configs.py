"""Every config can be read and built, and is what its name says."""

import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from dk_detection.config_files import framework_of
from dk_detection.datasets import deformed_shapes
from dk_detection.layers.table import TABLE

ROOT = Path(__file__).parents[2] / "configs" / "mmdet"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "_base_")
LAYERS = {row.token: row.layer for row in TABLE}

# {detector}_{backbone}[-{token}-{stages}]_{neck}_{schedule}_{dataset}
STEM = re.compile(
    r"(?P<detector>faster-rcnn|mask-rcnn)_r(?P<depth>\d+)"
    rf"(-(?P<token>{'|'.join(LAYERS)})-c(?P<first>\d)-c(?P<last>\d))?"
    r"_(?P<neck>fpn)_(?P<schedule>1x|\d+(\.\d+)?k)_(?P<dataset>coco|deformed-shapes)"
)

configs = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_are_configs():
    assert {path.parent.name for path in FILES} == {"dcnv2", "deformed_shapes"}
    assert len({path.stem for path in FILES}) == len(FILES) >= 8


@configs
def test_config_is_what_its_name_says(path):
    name = STEM.fullmatch(path.stem)
    assert name, "the stem does not follow the grammar"
    assert framework_of(path) == "mmdet"
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == ["dk_detection.mmdet"]
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.conv_offset.lr_mult == 0.1
    assert cfg.model.type == {"faster-rcnn": "FasterRCNN", "mask-rcnn": "MaskRCNN"}[name["detector"]]

    schedule = cfg.train_cfg
    if name["schedule"] == "1x":
        assert schedule.max_epochs == 12
    else:
        assert schedule.max_iters == 1000 * float(name["schedule"].removesuffix("k"))
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
    net = MODELS.build(cfg.model).backbone
    assert net.depth == int(name["depth"])
    places = {token: [n for n, m in net.named_modules() if type(m) is layer] for token, layer in LAYERS.items()}
    expected = {token: [] for token in LAYERS}
    if name["token"]:
        stages = range(int(name["first"]) - 1, int(name["last"]))  # c3 is the output of layer2
        expected[name["token"]] = [
            f"layer{stage}.{place}"
            for stage in stages
            for place, module in getattr(net, f"layer{stage}").named_modules()
            if isinstance(module, torch.nn.Conv2d)
            and module.kernel_size == (3, 3)
            and not place.endswith("conv_offset")
        ]
    assert places == expected


@pytest.mark.parametrize("path", [path for path in FILES if "conv-" in path.stem], ids=lambda path: path.stem)
def test_twins_differ_in_their_layers_only(path):
    token = STEM.fullmatch(path.stem)["token"]
    twin = path.with_name(re.sub(f"-{token}-c.-c.", "", path.name))
    assert twin.exists()
    ours, rigid = Config.fromfile(path), Config.fromfile(twin)
    for key in ours.keys() | rigid.keys():
        if key != "model":
            assert ours.get(key) == rigid.get(key), key
    backbone = ours.model.backbone
    for name in ("dcn", "stage_with_dcn", "exchange"):
        backbone.pop(name, None)
    if backbone.type == "DkDeformable":
        backbone.type = backbone.pop("network")
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
