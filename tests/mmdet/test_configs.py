"""Every config can be read and built, and is what its name says."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmcv.ops import RoIAlign
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from dk_detection.config_files import MMENGINE, framework_of
from dk_detection.datasets import deformed_shapes
from dk_detection.layers._scope import WithScope
from tests import stems
from tests.stems import LAYERS

ROOT = Path(__file__).parents[2] / "configs" / "mmdet"
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "_base_")
OUR_NETWORKS = ("r50-dw", "mobilenet-v2")
# The first epoch at each lower rate.
MILESTONES = {"1x": [8, 11], "16e": [10, 14]}

configs = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_are_configs():
    assert {path.parent.name for path in FILES} == {"dcnv1", "dcnv2", "deformed_shapes", "dk", "dke"}
    assert len({path.stem for path in FILES}) == len(FILES) >= 8


@configs
def test_config_is_what_its_name_says(path):
    name = stems.parse(path.stem)
    assert str(name) == path.stem
    assert framework_of(path) == MMENGINE
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == ["dk_detection.mmdet"]
    rates = {"conv_offset": 0.1} | ({"offset_fc": 0.01} if name.roi == "dpool" else {})
    rates |= {"kernel_offset": 0.01} if name.layers and name.layers[0][0] == "dk" else {}
    if name.dataset == "deformed-shapes":
        rates |= {"kernel_offset": 0.1} | ({"offset_fc": 0.1} if name.roi in ("mdpool", "dpool") else {})
    elif name.backbone in OUR_NETWORKS:  # Deformable Kernels, Section 4
        factor = {"r50-dw": 0.01, "mobilenet-v2": 0.1}[name.backbone]
        rates = {"kernel_offset": factor, "conv_offset": factor}
        assert cfg.optim_wrapper.optimizer.weight_decay == 4e-5
    if path.parent.name == "dcnv1":  # Deformable ConvNets, Sections 2.3 and 4.1
        rates.pop("conv_offset")
        optimizer = cfg.optim_wrapper.optimizer
        milestone = {"coco": 160000, "voc0712": 20000}[name.dataset]
        assert (optimizer.lr, cfg.param_scheduler[-1].milestones) == (0.001, [milestone])
    assert {key: value.lr_mult for key, value in cfg.optim_wrapper.paramwise_cfg.custom_keys.items()} == rates
    single_stage = name.detector in ("ssd", "class-aware-rpn")
    detector = "SingleStageDetector" if single_stage else "MaskRCNN" if name.detector == "mask-rcnn" else "FasterRCNN"
    assert cfg.model.type == ("DkMimicRCNN" if name.mimic else detector)
    box_head = cfg.model.bbox_head if single_stage else cfg.model.roi_head.bbox_head
    assert ("mask_head" in cfg.model.get("roi_head", {})) == (name.detector == "mask-rcnn")

    schedule = cfg.train_cfg
    if name.schedule in MILESTONES:
        assert schedule.max_epochs == {"1x": 12, "16e": 16}[name.schedule]
        assert cfg.param_scheduler[-1].milestones == MILESTONES[name.schedule]
    else:
        assert schedule.max_iters == 1000 * float(name.schedule.removesuffix("k"))
    if name.schedule == "16e":  # Deformable ConvNets v2, Sections 3.2 and 5.1
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.lr, optimizer.weight_decay, optimizer.momentum) == (0.02, 1e-4, 0.9)
        assert (cfg.model.train_cfg.rpn_proposal.max_per_img, cfg.model.test_cfg.rpn.max_per_img) == (2000, 1000)
    last = cfg.param_scheduler[-1]
    assert last.end == schedule.get("max_epochs", schedule.get("max_iters"))

    dataset = cfg.train_dataloader.dataset
    assert dataset.type == ("ConcatDataset" if name.dataset == "voc0712" else "CocoDataset")
    if name.dataset == "voc0712":
        sets = [*dataset.datasets, cfg.val_dataloader.dataset, cfg.test_dataloader.dataset]
        files = [f"VOC{one}.txt" for one in ("2007/ImageSets/Main/trainval", "2012/ImageSets/Main/trainval")]
        assert [one.ann_file for one in sets] == [*files, *2 * ["VOC2007/ImageSets/Main/test.txt"]]
        assert {(one.type, one.data_root) for one in sets} == {("VOCDataset", "data/VOCdevkit/")}
        assert all(one.ann_file.startswith(one.data_prefix.sub_data_root) for one in sets)
        assert [step.scale for one in sets for step in one.pipeline if step.type == "Resize"] == 4 * [(1000, 600)]
        assert box_head.num_classes == 20
    elif name.dataset == "coco":
        assert dataset.data_root == cfg.val_dataloader.dataset.data_root == "data/coco/"
        assert cfg.auto_scale_lr.base_batch_size == (8 if path.parent.name == "dcnv1" else 16)
    else:
        assert dataset.data_root == cfg.val_dataloader.dataset.data_root == "data/deformed_shapes/"
        assert box_head.num_classes == len(dataset.metainfo.classes)
        assert dataset.metainfo.classes == cfg.val_dataloader.dataset.metainfo.classes == deformed_shapes.CLASSES
    for mode in ("val", "test"):
        if name.dataset == "voc0712":
            expected = dict(type="VOCMetric", metric="mAP", eval_mode="11points", iou_thrs=[0.5, 0.7])
            assert {key: cfg[f"{mode}_evaluator"].get(key) for key in expected} == expected
            continue
        loader = cfg[f"{mode}_dataloader"].dataset
        assert cfg[f"{mode}_evaluator"].ann_file == loader.data_root + loader.ann_file
        metric = cfg[f"{mode}_evaluator"].metric
        assert metric == (["bbox", "segm"] if name.detector == "mask-rcnn" else "bbox")

    init_default_scope("mmdet")
    with torch.device("meta"):  # no memory, no initial values
        model = MODELS.build(cfg.model)
    if name.mimic:
        regions = {"mimic": "foreground", "mimic-bg": "background", "mimic-fgbg": "both"}[name.mimic]
        assert (model.mimic.regions, model.mimic.reduction) == (regions, "mean")
        if name.dataset == "coco":  # as in Deformable ConvNets v2, Section 3.3
            settings = (model.mimic.max_rois, model.mimic.patch_size, model.mimic.mimic_weight, model.mimic.cls_weight)
            assert settings == (32, 224, 0.1, 0.1)
    net = model.backbone
    if name.detector == "ssd":
        name.check_layers(net)
        return
    assert cfg.model.neck.type == ("FPN" if name.neck == "fpn" else "DkReduceLast")
    if name.neck != "fpn":
        conv2 = [module for place, module in net.layer4.named_modules() if place.endswith("conv2")]
        assert all((conv.stride, conv.dilation) == ((1, 1), (name.dilation,) * 2) for conv in conv2)
        if name.dataset == "coco":
            assert cfg.model.neck.out_channels == (256 if name.detector == "faster-rcnn" else 1024)
    if name.dataset == "voc0712":  # the anchors of Faster R-CNN
        anchors = model.bbox_head.prior_generator if single_stage else model.rpn_head.prior_generator
        assert (anchors.scales * anchors.strides[0][0]).tolist() == [128, 256, 512]
    heads = [] if single_stage else ["bbox", "mask"] if name.detector == "mask-rcnn" else ["bbox"]
    if name.detector == "class-aware-rpn":
        head = model.bbox_head
        assert head.rpn_cls.out_channels == head.num_base_priors * (box_head.num_classes + 1)
        assert name.backbone != "r101" or head.rpn_conv.weight.shape == (512, 1024, 3, 3)
    for head, size in zip(heads, (7, 14), strict=False):
        layers = getattr(model.roi_head, f"{head}_roi_extractor").roi_layers
        if name.detector == "rfcn":
            assert [layer.score.conv_offset is not None for layer in layers] == [name.roi == "dpspool"]
            size = 3 if name.dataset == "deformed-shapes" else 7
        else:
            assert {type(layer) for layer in layers} == {LAYERS[name.roi] if name.roi else RoIAlign}
        assert {layer.output_size for layer in layers} == {(size, size)}
        assert name.schedule != "16e" or {layer.sampling_ratio for layer in layers} == {2}
    if name.backbone in OUR_NETWORKS:  # the paper's scope, and as many experts as its parameters say
        name.check_layers(net, dict(num_experts={"r50-dw": 2, "mobilenet-v2": 8}[name.backbone]))
    elif name.backbone == "air":
        assert (type(net).__name__, net.frozen_stages) == ("DkAlignedInceptionResNet", 1)
        name.check_layers(net)
    else:
        assert net.depth == int(re.search(r"\d+", name.backbone)[0])
        if name.backbone == "x101-32x8d":
            assert (type(net).__name__, net.groups, net.base_width) == ("ResNeXt", 32, 8)
        name.check_layers(net)
    for layer in net.modules():
        if isinstance(layer, WithScope):
            assert layer.scope_size == tuple(size + 1 for size in layer.kernel_size)


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if str(stems.parse(p.stem).rigid()) != p.stem],
    ids=lambda path: path.stem,
)
def test_twins_differ_in_their_layers_only(path):
    name = stems.parse(path.stem)
    (twin,) = (file for file in FILES if file.stem == str(name.rigid()))
    ours, rigid = Config.fromfile(path), Config.fromfile(twin)
    for key in ("offset_fc", *({"kernel_offset"} - rigid.optim_wrapper.paramwise_cfg.custom_keys.keys())):
        ours.optim_wrapper.paramwise_cfg.custom_keys.pop(key, None)
    for key in (ours.keys() | rigid.keys()) - {"model", "roi_extractor"}:
        assert ours.get(key) == rigid.get(key), key
    if name.mimic:
        ours.model.type = rigid.model.type
        ours.model.pop("mimic", None)
    backbone = ours.model.backbone
    for option in ("dcn", "stage_with_dcn", "exchange"):
        backbone.pop(option, None)
    if backbone.type == "DkDeformable":
        backbone.type = backbone.pop("network")
    if name.roi:
        for key in ("bbox_roi_extractor", "mask_roi_extractor"):
            if extractor := ours.model.roi_head.get(key):
                extractor.type = rigid.model.roi_head[key].type
                extractor.roi_layer.type = rigid.model.roi_head[key].roi_layer.type
                for option in ("branch_size", "deform_fc_channels"):
                    extractor.roi_layer.pop(option, None)
                if "deform" in extractor.roi_layer:  # of R-FCN's layer
                    extractor.roi_layer.deform = False
    assert ours.model == rigid.model


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("DK_COCO_ROOT", "dcnv2/mask-rcnn_r50_fpn_1x_coco.py"),
        ("DK_DEFORMED_SHAPES_ROOT", "deformed_shapes"),
        ("DK_VOC_ROOT", "dcnv1/rfcn_r101_dc5_30k_voc0712.py"),
    ],
)
def test_data_root_from_the_environment(monkeypatch, variable, name):
    path = ROOT / name
    path = path if path.is_file() else next(path.glob("*.py"))
    for value in ("/some/where", "/some/where/"):
        monkeypatch.setenv(variable, value)
        cfg = Config.fromfile(path)
        sets = [cfg[f"{mode}_dataloader"].dataset for mode in ("train", "val", "test")]
        paths = [one.data_root for each in sets for one in each.get("datasets", [each])]
        if variable != "DK_VOC_ROOT":  # whose metric reads no file
            paths += [cfg[f"{mode}_evaluator"].ann_file for mode in ("val", "test")]
        assert all(path.startswith("/some/where/") for path in paths)
