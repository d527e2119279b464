"""R-FCN's head in MMDetection."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from dk_detection.mmdet import DkVoteHead
from tests.mmdet.test_configs_run import batch, shrink

CONFIG = Path(__file__).parents[2] / "configs/mmdet/deformed_shapes/rfcn_r50-dconv-c5_dc5_dpspool_1k_deformed-shapes.py"


def test_votes_become_boxes_of_every_class():
    """Two bins, two classes: a RoI whose box is moved and stretched by the mean of what its bins say."""
    head = DkVoteHead(num_classes=2)
    assert not list(head.parameters())
    pooled = torch.zeros(1, 2 + 1 + 4, 1, 2)
    pooled[0, 0] = torch.tensor([1.0, 3.0])  # class 0: 2
    pooled[0, 1] = torch.tensor([4.0, -2.0])  # class 1: 1
    pooled[0, 3] = torch.tensor([1.0, 3.0])  # dx: 2, times 0.1 of the width of 20
    pooled[0, 6] = torch.tensor([0.0, 10 * math.log(2)])  # dh: 5 log 2, times 0.2: twice the height
    scores, deltas = head(pooled)
    assert scores.tolist() == [[2, 1, 0]]
    (found,) = head.predict_by_feat(
        (torch.tensor([[0.0, 10, 20, 30, 60]]),),
        (scores,),
        (deltas,),
        batch_img_metas=[dict(img_shape=(200, 200), scale_factor=(1.0, 1.0))],
        rcnn_test_cfg=ConfigDict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10),
    )
    assert found.labels.tolist() == [0, 1]
    total = math.exp(2) + math.exp(1) + 1
    assert found.scores.tolist() == pytest.approx([math.exp(2) / total, math.exp(1) / total])
    for box in found.bboxes.tolist():
        assert box == pytest.approx([14, 0, 34, 80])


def test_wrong_channels():
    head = DkVoteHead(num_classes=2)
    with pytest.raises(ValueError, match=r"num_classes \+ 1 scores and 4 deltas, 7 channels, got 8"):
        head(torch.zeros(1, 8, 3, 3))


def test_online_hard_example_mining():
    cfg = Config.fromfile(CONFIG)
    init_default_scope("mmdet")
    shrink(cfg.model)
    cfg.model.train_cfg.rcnn.sampler.type = "OHEMSampler"
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    log = model.train_step(batch(), build_optim_wrapper(model, cfg.optim_wrapper))
    assert log["loss"].isfinite() and log["loss_bbox"] > 0
