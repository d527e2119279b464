"""Deformable RoI pooling in Detectron2's RoI heads."""

import copy

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from dk_detection.detectron2 import DkReduceLast, DkROIPooler
from dk_detection.layers import DeformPSRoIPool, DeformRoIPool, ModulatedDeformRoIPool, RFCNPool
from dk_detection.layers.table import TABLE
from tests.detectron2.small import batch, detector

ROWS = [row for row in TABLE if row.kind == "roi"]
SCALES = (1 / 4, 1 / 8, 1 / 16)
MAPS = [(32, 40), (16, 20), (8, 10)]
DC5 = "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml"


def maps(channels=6):
    return [torch.rand(2, channels, *size) for size in MAPS]


def boxes(*counts):
    lists = []
    for count in counts:
        corner = torch.rand(count, 2) * 60
        size = 2 ** (torch.rand(count, 2) * 5 + 3)  # 8 to 256 pixels
        lists.append(Boxes(torch.cat([corner, corner + size], 1)))
    return lists


def pooler(kind="DkDeformRoIPool", **options):
    return DkROIPooler(5, SCALES, 2, kind, channels=6, canonical_box_size=64, canonical_level=3, **options)


@pytest.mark.parametrize("share", [True, False])
def test_at_rest_it_is_rigid_pooling(share):
    rigid = ROIPooler(5, SCALES, 2, "ROIAlignV2", canonical_box_size=64, canonical_level=3)
    features, lists = maps(), boxes(40, 3)
    expected = rigid(features, lists)
    torch.testing.assert_close(pooler(share_levels=share)(features, lists), expected)
    modulated = pooler("DkModulatedDeformRoIPool", share_levels=share, deform_fc_channels=8)
    torch.testing.assert_close(modulated(features, lists), expected / 2)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.token)
@pytest.mark.parametrize("counts", [(20, 7), (0, 1), (0, 0)])
def test_every_parameter_gets_a_gradient(row, share, counts):
    """Also where a level, or all of them, have no RoI: distributed training waits for it."""
    module = pooler(row.name, share_levels=share)
    assert len(module.roi_layers) == (1 if share else 3)
    pooled = module(maps(), boxes(*counts))
    assert pooled.shape == (sum(counts), 6, 5, 5)
    pooled.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_levels_pool_at_their_scale():
    module = pooler(share_levels=False)
    for layer in module.roi_layers:
        layer.offset_fc[-1].bias.data.uniform_(-1, 1)
    features, lists = maps(), boxes(30, 30)
    pooled = module(features, lists)
    rois = convert_boxes_to_pooler_format(lists)
    per_level = [
        layer(feature, rois, spatial_scale=scale)
        for layer, feature, scale in zip(module.roi_layers, features, SCALES, strict=True)
    ]
    matches = torch.stack([(pooled == one).flatten(1).all(1) for one in per_level])
    assert matches.any(0).all()
    assert matches.any(1).all()  # each level has RoIs
    torch.testing.assert_close(copy.deepcopy(module)(features, lists), pooled)


def test_parameters_are_named_once_and_copies_are_separate():
    module = pooler("DkModulatedDeformRoIPool")
    assert [name.split(".")[:2] for name in module.state_dict()] == [["roi_layers", "0"]] * 4
    other = copy.deepcopy(module)
    other.roi_layers[0].offset_fc[-1].bias.data.fill_(1)
    features, lists = maps(), boxes(9, 2)
    assert not other(features, lists).allclose(module(features, lists))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    module = pooler("DkModulatedDeformRoIPool")
    features, lists = [value.to(dtype) for value in maps()], boxes(9, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(features, lists).dtype == dtype


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(kind="ROIAlignV2"), ValueError, "pooler_type must be one of DkDeformRoIPool, .*, got 'ROIAlignV2'"),
        (dict(kind="DkDeformConv2d"), ValueError, "got 'DkDeformConv2d'"),
        (dict(fc=3), TypeError, "fc"),
        (dict(branch="other"), ValueError, "branch must be 'paper' or 'mmcv'"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        pooler(**options)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.token)
def test_yaml(row):
    """Mask R-CNN with FPN: both heads, each with its options."""
    net = detector(
        *("MODEL.ROI_HEADS.NAME", "DkROIHeads"),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", row.name),
        *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", row.name),
        *(() if row.layer in (DeformPSRoIPool, RFCNPool) else ("MODEL.DK.MASK_POOLER.BRANCH_SIZE", 7)),
    )
    heads = net.roi_heads
    box, mask = heads.box_pooler.roi_layers[0], heads.mask_pooler.roi_layers[0]
    assert (type(box), type(mask)) == (row.layer, row.layer)
    assert (box.output_size, mask.output_size) == ((7, 7), (14, 14))
    if row.layer not in (DeformPSRoIPool, RFCNPool):
        assert (box.branch_size, mask.branch_size) == ((7, 7), (7, 7))
    with EventStorage():
        losses = net(batch())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in (*heads.box_pooler.parameters(), *heads.mask_pooler.parameters()))
    with torch.no_grad():
        assert all(result["instances"].has("pred_masks") for result in net.eval()(batch()))


def test_yaml_of_one_head():
    net = detector("MODEL.ROI_HEADS.NAME", "DkROIHeads", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "DkDeformRoIPool")
    assert type(net.roi_heads.box_pooler) is ROIPooler
    assert isinstance(net.roi_heads.mask_pooler.roi_layers[0], DeformRoIPool)


def test_dilated_conv5_with_proposals_of_conv4():
    """The Faster R-CNN of Deformable ConvNets v2, in YAML."""
    net = detector(
        *("MODEL.BACKBONE.NAME", "build_dk_reduced_resnet_backbone"),
        *("MODEL.DK.REDUCED_CHANNELS", 24),
        *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
        *("MODEL.RPN.IN_FEATURES", ["res4"]),
        *("MODEL.ROI_HEADS.NAME", "DkROIHeads"),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "DkModulatedDeformRoIPool"),
        exchange=[dict(layer="mdconv", select="backbone.bottom_up.res[345].*.conv2")],
        base=DC5,
    )
    assert isinstance(net.backbone, DkReduceLast)
    assert net.backbone.output_shape() == {
        "res4": ShapeSpec(channels=128, stride=16),
        "res5": ShapeSpec(channels=24, stride=16),
    }
    assert net.roi_heads.box_head.fc1.in_features == 24 * 49
    assert isinstance(net.roi_heads.box_pooler.roi_layers[0], ModulatedDeformRoIPool)
    with EventStorage():
        losses = net(batch())
    sum(losses.values()).backward()
    left_out = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert left_out == []
