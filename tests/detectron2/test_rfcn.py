"""R-FCN's predictor in Detectron2."""

import math

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances

from dk_detection.detectron2 import DkVotePredictor


def make():
    return DkVotePredictor(num_classes=2, box2box_transform=Box2BoxTransform((10, 10, 5, 5)), test_score_thresh=0.0)


def test_votes_become_boxes_of_every_class():
    """Two bins, two classes: a RoI whose box is moved and stretched by the mean of what its bins say."""
    predictor = make()
    assert not list(predictor.parameters())
    pooled = torch.zeros(1, 2 + 1 + 4, 1, 2)
    pooled[0, 0] = torch.tensor([1.0, 3.0])  # class 0: 2
    pooled[0, 1] = torch.tensor([4.0, -2.0])  # class 1: 1
    pooled[0, 3] = torch.tensor([1.0, 3.0])  # dx: 2, a tenth of it times the width of 20
    pooled[0, 6] = torch.tensor([0.0, 10 * math.log(2)])  # dh: 5 log 2, a fifth of it: twice the height
    proposals = Instances((200, 200), proposal_boxes=Boxes(torch.tensor([[10.0, 20, 30, 60]])))
    (found,), _ = predictor.inference(predictor(pooled), [proposals])
    assert found.pred_classes.tolist() == [0, 1]
    total = math.exp(2) + math.exp(1) + 1
    assert found.scores.tolist() == pytest.approx([math.exp(2) / total, math.exp(1) / total])
    for box in found.pred_boxes.tensor.tolist():
        assert box == pytest.approx([14, 0, 34, 80])


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"num_classes \+ 1 scores and 4 deltas, 7 channels, got 8"):
        make()(torch.zeros(1, 8, 3, 3))
