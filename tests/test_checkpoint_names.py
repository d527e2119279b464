"""Names of parameters in both frameworks, which takes neither of them."""

import pytest
import torch

from dk_detection.checkpoint_names import framework_of_names, to_detectron2, to_mmdet
from dk_detection.errors import UserError


def test_framework():
    assert framework_of_names(["backbone.layer1.0.conv1.weight", "neck.x"]) == "mmdet"
    assert framework_of_names(["backbone.bottom_up.stem.conv1.weight"]) == "detectron2"


def test_offsets_of_detectron2():
    offset = {"backbone.bottom_up.res3.1.conv2_offset.weight": torch.zeros(18, 4, 3, 3)}
    assert list(to_mmdet(offset)) == ["backbone.layer2.1.conv2.conv_offset.weight"]


def test_what_is_left_out():
    assert not to_detectron2({"backbone.bn1.num_batches_tracked": torch.tensor(3)})
    buffers = ("proposal_generator.anchor_generator.cell_anchors.0", "pixel_mean", "pixel_std")
    assert not to_mmdet({name: torch.zeros(3) for name in buffers})


def test_unknown_names_and_anchors_that_do_not_fit():
    with pytest.raises(UserError, match=r"bbox_head\.cls\.weight: no detector of MMDetection"):
        to_detectron2({"bbox_head.cls.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="15 channels, which 4 aspect ratios"):
        to_detectron2({"rpn_head.rpn_cls.weight": torch.zeros(15, 2, 1, 1)}, num_ratios=4)


def test_aligned_inception_resnet_has_the_same_names_in_both():
    names = ("conv1", "layer1.0.reduce1", "layer4.2.conv3", "layer4.2.conv3.conv_offset", "layer2.0.downsample.0")
    state = {f"backbone.{name}.weight": torch.zeros(1) for name in names}
    converted = to_detectron2(state)
    assert list(converted) == [f"backbone.bottom_up.{name}.weight" for name in names]
    assert list(to_mmdet(converted)) == list(state)
