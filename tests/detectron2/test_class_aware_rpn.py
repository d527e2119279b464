"""Class-aware RPN in Detectron2; that it is MMDetection's: test_conversion.py."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from dk_detection.detectron2.tta import tta_of_lazy_config
from dk_detection.errors import UserError
from tests.detectron2.small import HEIGHT, WIDTH, batch

CONFIG = Path(__file__).parents[2] / "configs/detectron2/deformed_shapes/class-aware-rpn_r50_dc5_1k_deformed-shapes.py"


def make(**options):
    cfg = LazyConfig.load(str(CONFIG)).model
    cfg.update(options)
    for stage in cfg.backbone.bottom_up.stages:
        stage.update(num_blocks=1, stride_per_block=stage.stride_per_block[:1])
    return instantiate(cfg)


@pytest.mark.parametrize(("boundary", "outside"), [(0, False), (-1, True)])
def test_anchors_are_sampled_as_in_an_rpn(boundary, outside):
    model = make(batch_size_per_image=16, positive_fraction=0.25, anchor_boundary_thresh=boundary)
    truth = [one["instances"] for one in batch()]
    anchors = model.anchor_generator([torch.zeros(1, 1, HEIGHT // 8, WIDTH // 8)])
    inside = anchors[0].inside_box((HEIGHT, WIDTH), 0)
    labels, boxes = model.label_anchors(anchors, truth)
    learned_outside, number = False, 0
    for found, of_anchors, image in zip(labels, boxes, truth, strict=True):
        assert found.shape == (len(anchors[0]),) and of_anchors.shape == (len(anchors[0]), 4)
        objects = (found >= 0) & (found < 6)
        assert objects.sum() <= 4 and (found >= 0).sum() == 16 and (found == 6).sum() == 16 - objects.sum()
        for label, box in zip(found[objects], of_anchors[objects], strict=True):
            assert image.gt_boxes.tensor[label].equal(box)  # the classes are the numbers of the objects
        number += int(objects.sum())
        learned_outside |= bool((found[~inside] >= 0).any())
    assert learned_outside == outside and number > 0


def test_losses_and_detections_of_a_head_that_knows_nothing():
    model = make(test_score_thresh=0.0)
    for layer in (model.head.objectness_logits, model.head.anchor_deltas):
        torch.nn.init.zeros_(layer.weight)
    losses = model(batch())
    assert losses["loss_cls"].item() == pytest.approx(math.log(7))
    assert losses["loss_box_reg"] > 0
    model.eval()
    model.head.objectness_logits.bias.data.view(9, 7)[4, [1, 3]] = 5.0  # two classes of one of the anchors
    found = model(batch())[0]["instances"]
    best = found[found.scores > 0.4]
    assert set(best.pred_classes.tolist()) == {1, 3}  # one does not suppress the other
    both = 2 * math.exp(5) + 5
    assert found.scores.max().item() == pytest.approx(math.exp(5) / both)


def test_refusals():
    with pytest.raises(ValueError, match=r"head must give num_anchors \* \(num_classes \+ 1\) = 9 \* 4 scores, got 63"):
        cfg = LazyConfig.load(str(CONFIG)).model
        cfg.head.num_classes = 6
        cfg.num_classes = 3
        instantiate(cfg)
    with pytest.raises(UserError, match="test-time augmentation is for a GeneralizedRCNN, this is a DkClassAwareRPN"):
        tta_of_lazy_config(OmegaConf.create({}), make())
