"""Detectors counted part by part."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.registry import init_default_scope

from dk_detection.complexity.counting import Part, total
from dk_detection.errors import UserError
from dk_detection.mmdet.complexity import count_config, count_detector

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = CONFIGS / "mmdet" / "deformed_shapes" / "mask-rcnn_r18-mdconv-c3-c5_fpn_1k_deformed-shapes.py"

# mmdet's Mask R-CNN, made small: maps of 16, 8, 4, 2 and 1 pixels for an image of 64.
MODEL = dict(
    backbone=dict(base_channels=8, stem_channels=8, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=8, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=4, num_convs=1, num_classes=2),
    ),
    test_cfg=dict(rcnn=dict(max_per_img=5)),
)


def detector(**options):
    cfg = Config(dict(_base_=[]))
    cfg.model = Config.fromfile(CONFIGS / "mmdet" / "dcnv2" / "mask-rcnn_r50_fpn_1x_coco.py").model
    cfg.merge_from_dict(dict(model=MODEL | options))
    init_default_scope("mmdet")
    with torch.device("meta"):
        return MODELS.build(cfg.model)


def test_parts():
    parts = {part.name: part for part in count_detector(detector(), (64, 64), rois=7)}
    assert list(parts) == ["backbone", "neck", "RPN", "box head", "mask head"]
    positions = 16**2 + 8**2 + 4**2 + 2**2 + 1
    assert parts["RPN"].multiply_adds == positions * (16 * 16 * 9 + 16 * (3 + 12))
    assert parts["neck"].multiply_adds == (
        sum(side**2 * channels * 16 for side, channels in ((16, 32), (8, 64), (4, 128), (2, 256)))
        + (positions - 1) * 16 * 16 * 9
    )
    # Aligned pooling has 4 samples in a bin, each worth 2; a RoI sees two fully connected layers and two branches.
    pooling = 16 * 7 * 7 * 4 * 2
    assert parts["box head"].multiply_adds == 7 * (pooling + 16 * 49 * 8 + 8 * 8 + 8 * 3 + 8 * 8)
    assert parts["mask head"].multiply_adds == 5 * (
        4 * pooling + 14**2 * (16 * 4 * 9 + 4 * 4 * 4) + 28**2 * 4 * 2  # a convolution, a deconvolution, two classes
    )
    whole = detector()
    assert total(list(parts.values())).parameters == sum(p.numel() for p in whole.parameters())
    assert parts["backbone"].parameters == sum(p.numel() for p in whole.backbone.parameters())


def test_what_does_not_run_is_said():
    net = detector()
    net.branch = nn.Linear(3, 4, device="meta")
    assert count_detector(net, (64, 64), rois=1)[-1] == Part("not run", 16, 0)


def test_count_depends_on_the_arguments_only():
    torch.manual_seed(1)
    first = count_config(SMALL, (96, 128), rois=20)
    torch.manual_seed(2)
    assert count_config(SMALL, (96, 128), rois=20) == first
    names = [part.name for part in first]
    one = count_config(SMALL, (96, 128), rois=10)[names.index("box head")]
    assert first[names.index("box head")].multiply_adds == 2 * one.multiply_adds


def test_agrees_with_mmengine():
    dcn = dict(dcn=dict(type="DkModulatedDeformConv2d"), stage_with_dcn=(False, True, True, True))
    net = detector(backbone=MODEL["backbone"] | dcn)
    parts = count_detector(net, (96, 128), rois=1)
    theirs = FlopAnalyzer(net.backbone.to_empty(device="cpu"), torch.rand(1, 3, 96, 128)).by_operator()
    assert parts[0].multiply_adds == theirs["conv"] + theirs["deform_conv2d"]


def test_single_stage(tmp_path):
    path = tmp_path / "retinanet.py"
    path.write_text("_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'\n")
    parts = count_config(path, (64, 64))
    assert [part.name for part in parts] == ["backbone", "neck", "dense head"]
    assert all(part.multiply_adds > 0 for part in parts)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("model = dict(type='FasterRCN')", (64, 64), r"wrong.py: the config's model cannot be built \(KeyError"),
        ("train_cfg = dict()", (64, 64), "wrong.py: the config's model cannot be built"),
        (
            "_base_ = 'mmdet::_base_/models/cascade-rcnn_r50_fpn.py'",
            (64, 64),
            "wrong.py: only single-stage detectors and two-stage ones .* got CascadeRCNN",
        ),
        (
            "_base_ = 'mmdet::ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py'",
            (64, 64),
            "wrong.py: a RoI head with more than boxes and masks cannot be counted, got MaskScoringRoIHead with mask_i",
        ),
        (
            "_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'\n"
            "model = dict(backbone=dict(dcn=dict(type='DCNv2'), stage_with_dcn=(False, False, False, True)))",
            (64, 64),
            r"wrong.py: the backbone \(ResNet\) cannot be counted: ",
        ),
    ],
)
def test_wrong_configs(tmp_path, text, shape, message):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        count_config(path, shape)
