"""Every config trains a step with its own optimiser and detects: on the CPU, made small, nothing downloaded."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from dk_detection.layers._base import ZeroConv2d
from tests import stems

ROOT = Path(__file__).parents[2] / "configs" / "mmdet"
# One of those that differ only in what tests/mmdet/test_configs.py sees to.
FILES = list(
    {
        stems.parse(path.stem).build(): path
        for path in sorted(ROOT.rglob("*.py"), reverse=True)
        if path.parent.name != "_base_"
    }.values()
)

HEIGHT, WIDTH = 64, 96
# An image each: left, top, right, bottom.
BOXES = ([[5, 8, 45, 50], [30, 20, 90, 60]], [[10, 4, 70, 40]])

# What is made smaller wherever it stands in a model: proposals, samples, hidden features, the number of equal blocks.
# (A score threshold below 0 lets a detector detect something even if it is sure that there is nothing; many anchors are
# larger than the images here, and with a border below 0 they are learned from all the same.)
AT_MOST = {
    **{"nms_pre": 50, "max_per_img": 20, "num": 32, "fc_out_channels": 32, "depth": 50},
    **{"score_thr": -1.0, "allowed_border": -1},
}


def shrink(part) -> None:
    """Makes the model of a config small, in place. Its layers and their places stay as they are."""
    if isinstance(part, list):
        for value in part:
            shrink(value)
    elif isinstance(part, dict):
        if {part.get("type"), part.get("network")} & {"DkResNetDW", "DkAlignedInceptionResNet"}:
            part["blocks"] = (1, 1, 1, 1)
        for key, value in part.items():
            if key == "init_cfg":
                part[key] = None
            elif key in AT_MOST:
                part[key] = min(value, AT_MOST[key])
            else:
                shrink(value)


def batch() -> dict:
    """Two images with their objects, as a data loader hands them over."""
    samples = []
    for boxes in BOXES:
        masks = np.zeros((len(boxes), HEIGHT, WIDTH), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = 1
        size = (HEIGHT, WIDTH)
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.arange(len(boxes)),
            masks=BitmapMasks(masks, HEIGHT, WIDTH),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
        samples.append(sample)
    return dict(inputs=list(torch.randint(256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8)), data_samples=samples)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_trains_and_detects(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    shrink(cfg.model)
    if cfg.model.type == "DkMimicRCNN":
        cfg.model.mimic = {**cfg.model.get("mimic", {}), "patch_size": 32, "max_rois": 4}
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()

    # The keys of the config's learning-rate factors name the branches that steer the sampling, all of them.
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    optimizer = optim_wrapper.optimizer
    base_rate = cfg.optim_wrapper.optimizer.lr
    rates = {p: group["lr"] / base_rate for group in optimizer.param_groups for p in group["params"]}
    factors = {key: options["lr_mult"] for key, options in cfg.optim_wrapper.paramwise_cfg.custom_keys.items()}
    full_rate_of_offsets = not factors or path.parent.name == "dcnv1"
    branches = {p for m in model.modules() if isinstance(m, ZeroConv2d) for p in m.parameters()}
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert rates.keys() == set(learning.values())
    for name, parameter in learning.items():
        keys = [key for key in factors if key in name]
        full_rate = parameter not in branches or re.search("routing|attention", name) or full_rate_of_offsets
        assert keys or full_rate, f"no learning-rate factor for {name}"
        assert rates[parameter] == pytest.approx(factors[max(keys, key=len)] if keys else 1), name

    log = model.train_step(batch(), optim_wrapper)
    assert log["loss"] > 0
    assert all(value.isfinite().all() for value in log.values()), log
    # Distributed training waits for the gradient of every parameter.
    left_out = [name for name, p in learning.items() if p not in optimizer.state]
    assert not left_out, f"without a gradient: {left_out}"
    assert all(p.isfinite().all() for p in learning.values())

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch())
    assert len(results) == 2
    for result in results:
        found = result.pred_instances
        assert len(found) > 0
        assert found.bboxes.isfinite().all()
        assert found.scores.isfinite().all()
        if model.with_mask:
            assert found.masks.shape == (len(found), HEIGHT, WIDTH)
