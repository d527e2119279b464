"""Detectors of Detectron2 counted part by part."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2 import model_zoo
from torch import nn

from dk_detection.complexity.counting import Part, total
from dk_detection.detectron2.complexity import count_config, count_detector
from dk_detection.errors import UserError
from dk_detection.mmdet.complexity import count_config as count_mmdet
from tests.detectron2.small import detector

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "name",
    [
        "dcnv2/faster-rcnn_r50-mdconv-c3-c5_dc5_mdpool_mimic_16e_coco",
        "dcnv2/mask-rcnn_r50-dconv-c3-c5_fpn_dpool_16e_coco",
        "dk/faster-rcnn_mobilenet-v2-dk-gdk-1x1_fpn_1x_coco",
        "deformed_shapes/mask-rcnn_r18-dkmdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes",
    ],
)
def test_the_same_as_in_mmdetection(name):
    """The detectors of one name are one network, so they cost the same."""
    ours, theirs = (
        {part.name: part.multiply_adds for part in count(CONFIGS / framework / f"{name}.py", (64, 128), 20)}
        for count, framework in ((count_config, "detectron2"), (count_mmdet, "mmdet"))
    )
    assert ours.pop("backbone") == theirs.pop("backbone") + theirs.pop("neck")
    assert ours == theirs


def test_parts():
    with torch.device("meta"):
        model = detector("MODEL.DEVICE", "meta")
    model.branch = nn.Linear(3, 4, device="meta")
    expected = sum(p.numel() for p in model.parameters())
    parts = count_detector(model, (64, 96), rois=7)
    assert [part.name for part in parts] == ["backbone", "RPN", "box head", "mask head", "not run"]
    assert total(parts).parameters == expected
    assert parts[-1] == Part("not run", 16, 0)
    # Aligned pooling has 4 samples in a bin, each worth 2; a RoI sees two fully connected layers and two branches.
    assert parts[2].multiply_adds == 7 * (16 * 7 * 7 * 4 * 2 + 16 * 49 * 32 + 32 * 32 + 32 * 4 + 32 * 12)


def test_image_is_padded_where_the_backbone_asks_for_it():
    config = CONFIGS / "detectron2" / "dcnv2" / "faster-rcnn_r50_fpn_1x_coco.yaml"
    assert count_config(config, (33, 70), 1) == count_config(config, (64, 96), 1)


def test_dense_detector():
    parts = count_config(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"), (64, 96))
    assert [part.name for part in parts] == ["backbone", "dense head"]
    assert all(part.multiply_adds > 0 for part in parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n  META_ARCHITECTURE: FasterRCN\n", r"wrong.yaml: the model cannot be built \(KeyError"),
        ("MODEL:\n  META_ARCHITECTUR: x\n", r"wrong.yaml: the config cannot be loaded \(KeyError"),
        ("MODEL:\n  ROI_HEADS:\n    NAME: Res5ROIHeads\n", "wrong.yaml: only .* got GeneralizedRCNN with Res5ROIH"),
    ],
)
def test_wrong_configs(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        count_config(path, (64, 64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x", "got GeneralizedRCNN with CascadeROIHeads"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", "for boxes and masks alone, can be counted, got GeneralizedRCNN"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", "got PanopticFPN with StandardROIHeads"),
    ],
)
def test_what_would_be_counted_too_low(name, message):
    with pytest.raises(UserError, match=message):
        count_config(model_zoo.get_config_file(f"{name}.yaml"), (64, 64))
