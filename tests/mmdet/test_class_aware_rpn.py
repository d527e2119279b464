"""Class-aware RPN in MMDetection."""

import math

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from tests.mmdet.test_configs_run import HEIGHT, ROOT, WIDTH

CONFIG = ROOT / "deformed_shapes" / "class-aware-rpn_r50_dc5_1k_deformed-shapes.py"


def make():
    cfg = Config.fromfile(CONFIG)
    init_default_scope("mmdet")
    cfg.model.bbox_head.update(train_cfg=cfg.model.train_cfg, test_cfg=cfg.model.test_cfg)
    return MODELS.build(cfg.model.bbox_head)


def test_layers():
    head = make()
    assert {name: tuple(value.shape) for name, value in head.state_dict().items() if name.endswith("weight")} == {
        "rpn_conv.weight": (64, 128, 3, 3),
        "rpn_cls.weight": (9 * (6 + 1), 64, 1, 1),
        "rpn_reg.weight": (9 * 4, 64, 1, 1),
    }


def test_losses_and_detections_of_a_head_that_knows_nothing():
    head = make()
    for layer in (head.rpn_cls, head.rpn_reg):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    scores, deltas = head((torch.randn(1, 128, HEIGHT // 8, WIDTH // 8),))
    truth = InstanceData(bboxes=torch.tensor([[5.0, 8, 45, 50]]), labels=torch.tensor([4]))
    size = dict(img_shape=(HEIGHT, WIDTH), pad_shape=(HEIGHT, WIDTH), scale_factor=(1.0, 1.0))
    losses = head.loss_by_feat(scores, deltas, [truth], [size])
    assert losses["loss_cls"][0].item() == pytest.approx(math.log(7))
    assert losses["loss_bbox"][0] > 0
    labels, weights = (part[0][0] for part in head.get_targets(*anchors_of(head, size), [truth], [size])[:2])
    assert weights.sum() == 128 and set(labels[weights > 0].tolist()) == {4, 6}

    scores[0].data.view(1, 9, 7, -1)[0, 4, [1, 3]] = 5.0  # two classes of one of the anchors
    (found,) = head.predict_by_feat(scores, deltas, batch_img_metas=[size])
    assert set(found.labels.tolist()) >= {1, 3}  # one does not suppress the other
    assert found.scores.max().item() == pytest.approx(math.exp(5) / (2 * math.exp(5) + 5))


def anchors_of(head, size):
    return head.get_anchors([(HEIGHT // 8, WIDTH // 8)], [size], device="cpu")
