"""Every config is what its name says, trains a step with its own optimiser and detects: on the CPU, made small."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig

from dk_detection.config_files import DETECTRON2, framework_of
from dk_detection.detectron2 import (
    DkAlignedInceptionResNet,
    DkClassAwareRPN,
    DkMimicRCNN,
    DkReduceLast,
    DkResNetDW,
    DkVOCEvaluator,
    add_dk_config,
)
from dk_detection.detectron2.train import Trainer
from dk_detection.layers._base import ZeroConv2d
from tests import stems
from tests.detectron2.small import HEIGHT, WIDTH, batch
from tests.stems import LAYERS

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted(
    path for kind in ("py", "yaml") for path in (ROOT / "detectron2").rglob(f"*.{kind}") if path.parent.name != "_base_"
)
# One of those that differ in data, in dilation and in how many convolutions are deformable only.
BUILT = {stems.parse(path.stem).build(): path for path in reversed(FILES)}
OUR_NETWORKS = (DkAlignedInceptionResNet, DkResNetDW)
OUR_NETWORKS += tuple(f"{network.__module__}.{network.__qualname__}" for network in OUR_NETWORKS)
# What is set wherever it stands in a model: proposals, samples, results; patches of 224 pixels take long. (A score
# threshold below 0 lets a detector detect something even if its first step made it quite sure that there is nothing.)
SMALL = {
    **dict(batch_size_per_image=32, test_topk_per_image=5, test_score_thresh=-1.0, num_blocks=1),
    **dict(pre_nms_topk=[20, 20], post_nms_topk=[20, 20], max_detections_per_image=5, anchor_boundary_thresh=-1),
}


def shrink(part) -> None:
    """Makes the model of a LazyConfig small, in place. Its kinds of layers and their places stay as they are."""
    if isinstance(part, ListConfig):
        for value in part:
            shrink(value)
    elif isinstance(part, DictConfig):
        for key in list(part):
            value = part[key]
            if key in SMALL:
                part[key] = SMALL[key]
            elif key == "stride_per_block":
                part[key] = value[:1]
            elif key == "fc_dims":
                part[key] = [32] * len(value)
            elif key == "box_predictor":
                value.input_shape.channels = 32
                shrink(value)
            elif key == "pixel_std":  # 1 where the pretrained weights see to the scale of images; random ones do not
                part[key] = [max(std, 50.0) for std in value]
            elif key == "mimic":
                part[key] = {**value, "max_rois": 2, "patch_size": 64}
            else:
                shrink(value)
        if part.get("_target_") in OUR_NETWORKS:
            part.blocks = (1, 1, 1, 1)


def read(path):
    """The model of a config, small, its optimiser, and the factor for a parameter that the config means."""
    if path.suffix == ".py":
        cfg = LazyConfig.load(str(path))
        shrink(cfg.model)
        model = instantiate(cfg.model)
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        factors = dict(cfg.optimizer.params.lr_factor_func.factors)
        return cfg, model, optimizer, factors, cfg.optimizer.lr
    cfg = get_cfg()
    add_dk_config(cfg)
    cfg.merge_from_file(str(path))
    small = {
        **{"MODEL.DEVICE": "cpu", "MODEL.ROI_BOX_HEAD.FC_DIM": 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32},
        **{"MODEL.RPN.POST_NMS_TOPK_TRAIN": 20, "MODEL.RPN.POST_NMS_TOPK_TEST": 20, "TEST.DETECTIONS_PER_IMAGE": 5},
        **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": -1.0},
    }
    cfg.merge_from_list([value for item in small.items() for value in item])
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    return cfg, model, optimizer, dict(cfg.SOLVER.DK_LR_FACTORS), cfg.SOLVER.BASE_LR


def test_the_same_stems_as_for_mmdetection():
    for family in ("dcnv1", "dcnv2", "dk", "dke", "deformed_shapes"):
        ours, theirs = ({path.stem for path in (ROOT / name / family).iterdir()} for name in ("detectron2", "mmdet"))
        assert ours == {stem for stem in theirs if not stem.startswith("ssd_")}  # Detectron2 has no SSD
    assert len({path.stem for path in FILES}) == len(FILES)


@pytest.mark.parametrize("path", [p for p in FILES if p not in BUILT.values()], ids=lambda path: path.stem)
def test_config_that_differs_little(path):
    """In the small network of the others the last convolutions would not be those that the config means."""
    name = stems.parse(path.stem)
    assert str(name) == path.stem
    assert framework_of(path) == DETECTRON2
    cfg = LazyConfig.load(str(path))
    with torch.device("meta"):
        check_contents(name, cfg, instantiate(cfg.model))


@pytest.mark.parametrize("path", BUILT.values(), ids=lambda path: path.stem)
def test_config(path):
    name = stems.parse(path.stem)
    assert str(name) == path.stem
    assert framework_of(path) == DETECTRON2
    cfg, model, optimizer, factors, base_rate = read(path)
    check_contents(name, cfg, model)

    expected = {"dpool": 0.01, "mdpool": 0.1 if name.dataset == "deformed-shapes" else None}.get(name.roi)
    assert factors.get("offset_fc") == expected

    # The keys of the learning-rate factors name the branches that steer the sampling, all of them.
    rates = {p: group["lr"] / base_rate for group in optimizer.param_groups for p in group["params"]}
    learning = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert rates.keys() == set(learning.values())
    full_rate_of_offsets = not factors or path.parent.name == "dcnv1"
    branches = {p for m in model.modules() if isinstance(m, ZeroConv2d) for p in m.parameters()}
    for key, parameter in learning.items():
        parts = [part for part in factors if part in key]
        full_rate = parameter not in branches or re.search("routing|attention", key) or full_rate_of_offsets
        assert parts or full_rate, f"no learning-rate factor for {key}"
        assert rates[parameter] == pytest.approx(factors[max(parts, key=len)] if parts else 1), key

    model.train()
    with EventStorage():
        losses = model(batch())
    loss = sum(losses.values())
    assert loss > 0
    assert loss.isfinite()
    loss.backward()
    left_out = [key for key, p in learning.items() if p.grad is None]  # distributed training waits for them
    assert not left_out, left_out
    for group in optimizer.param_groups:
        group["lr"] *= 0.001  # where the warm-up begins, all the more in a network that nothing normalises
    optimizer.step()
    assert all(p.isfinite().all() for p in learning.values())

    model.eval()
    with torch.no_grad():
        for result in model(batch()):
            found = result["instances"]
            assert len(found) > 0
            assert found.pred_boxes.tensor.isfinite().all()
            if name.detector == "mask-rcnn":
                assert found.pred_masks.shape == (len(found), HEIGHT, WIDTH)


def check_contents(name, cfg, model) -> None:
    """That the model and the schedule are what the stem says."""
    heads = getattr(model, "roi_heads", None)
    assert (heads is None) == isinstance(model, DkClassAwareRPN) == (name.detector == "class-aware-rpn")
    assert heads is None or heads.mask_on == (name.detector == "mask-rcnn")
    assert isinstance(model.backbone, DkReduceLast) == (name.neck != "fpn")
    if name.neck != "fpn" and name.backbone != "r50-dw":
        last = model.backbone.bottom_up.layer4 if name.backbone == "air" else model.backbone.bottom_up.res5
        wide = [
            m for m in last.modules() if getattr(m, "kernel_size", None) == (3, 3) and not isinstance(m, ZeroConv2d)
        ]
        dilations = {conv.dilation for conv in wide}
        assert dilations == {(name.dilation,) * 2}
    assert isinstance(model, DkMimicRCNN) == bool(name.mimic)
    if name.mimic:
        regions = {"mimic": "foreground", "mimic-bg": "background", "mimic-fgbg": "both"}[name.mimic]
        assert model.mimic.regions == regions
    poolers = [] if heads is None else [heads.box_pooler, heads.mask_pooler] if heads.mask_on else [heads.box_pooler]
    for pooler in poolers:
        layers = list(getattr(pooler, "roi_layers", ()))
        if name.detector == "rfcn":
            assert [layer.score.conv_offset is not None for layer in layers] == [name.roi == "dpspool"]
        else:
            assert {type(layer) for layer in layers} == ({LAYERS[name.roi]} if name.roi else set())

    steps = cfg.train.max_iter if "train" in cfg else cfg.SOLVER.MAX_ITER
    assert steps == {"1x": 90000, "16e": 117280, "240k": 240000, "30k": 30000, "1k": 1000}[name.schedule]
    data = cfg.dataloader.train.dataset.names if "dataloader" in cfg else cfg.DATASETS.TRAIN[0]
    names = {"coco": "coco_2017_train", "deformed-shapes": "deformed_shapes_train"}
    names["voc0712"] = ["voc_2007_trainval", "voc_2012_trainval"]
    assert data == names[name.dataset]
    if name.dataset == "voc0712":
        multiplier = instantiate(cfg.lr_multiplier)
        assert (multiplier(19999 / 30000), multiplier(20001 / 30000)) == (1, 0.1)
        assert isinstance(instantiate(cfg.dataloader.evaluator), DkVOCEvaluator)
        assert cfg.dataloader.evaluator.dataset_name == "voc_2007_test"
        anchors = getattr(model, "proposal_generator", model).anchor_generator
        assert anchors.num_anchors == [9] and anchors.strides == [16]
        assert (heads or model).num_classes == 20
    if name.detector == "class-aware-rpn":
        channels = model.anchor_generator.num_anchors[0] * (model.num_classes + 1)
        assert model.head.objectness_logits.out_channels == channels
        assert name.backbone != "r101" or model.head.conv.weight.shape == (512, 1024, 3, 3)

    name.check_layers(model.backbone)
