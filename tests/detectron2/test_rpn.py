"""An RPN that learns from the anchors within the image only."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances

from dk_detection.detectron2 import DkRPN
from tests.detectron2.small import config

# Of the object in the corner the first anchor overlaps most, the second is the best one within the image.
ANCHORS = Boxes(torch.tensor([[-8.0, -8, 24, 24], [0, 0, 34, 34], [40, 40, 60, 60]]))


def label(rpn_type, boundary, boxes, size=(64, 64)):
    cfg = config("MODEL.RPN.BOUNDARY_THRESH", boundary, "MODEL.RPN.IN_FEATURES", ["p4"])
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    rpn = rpn_type(cfg, {"p4": ShapeSpec(channels=16, stride=16)})
    image = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)))
    (labels,), (matched,) = rpn.label_and_sample_anchors([ANCHORS], [image])
    return labels.tolist(), matched.tolist()


def test_object_at_the_border_keeps_an_anchor():
    corner = [0.0, 0, 20, 20]
    assert label(RPN, 0, [corner])[0] == [-1, -1, 0]  # the seam as it is in Detectron2
    labels, matched = label(DkRPN, 0, [corner])
    assert labels == [-1, 1, 0] and matched[0] == [0, 0, 0, 0] and matched[1] == corner
    assert label(DkRPN, 8, [corner])[0] == label(RPN, -1, [corner])[0] == [1, -1, 0]  # 8 pixels out are allowed
    assert label(DkRPN, -1, [corner]) == label(RPN, -1, [corner])


def test_nothing_to_match():
    assert label(DkRPN, 0, [])[0] == [-1, 0, 0]  # no object
    assert label(DkRPN, 0, [[0.0, 0, 9, 9]], size=(16, 16))[0] == [-1, -1, -1]  # no anchor in the image
