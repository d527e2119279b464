"""Our RoI layers in MMDetection's RoI heads, and the detector that proposes on conv4 and pools from conv5."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from dk_detection.layers import DeformRoIPool, ModulatedDeformRoIPool
from dk_detection.layers.table import TABLE
from dk_detection.mmdet import DkReduceLast, DkRoIExtractor, DkSingleLevelRPNHead

CONFIGS = Path(__file__).parents[2] / "configs" / "mmdet"
CHANNELS = 6
ROWS = [row for row in TABLE if row.kind == "roi"]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.token)
# The pooling of mmcv's geometry, which at rest is this share of RoIAlign.
AT_REST = {"DkDeformRoIPool": 1, "DkModulatedDeformRoIPool": 0.5}
at_rest = pytest.mark.parametrize(("name", "share"), AT_REST.items())
strides_ = pytest.mark.parametrize("strides", ([4, 8, 16, 32], [16]), ids=("fpn", "one level"))

# In images of 128 x 192 pixels, in no order of size; and the level of each in a pyramid of strides 4, 8, 16, 32.
ROIS = torch.tensor(
    [
        [0, 3.3, 2.1, 60.2, 55.9],
        [1, 100.7, 40.3, 131.1, 59.4],
        [0, 1.2, 0.4, 191.7, 127.6],
        [1, -5.0, 10.0, 12.3, 30.7],
        [0, 30.0, 5.0, 151.3, 60.2],
    ]
)
LEVELS = [1, 0, 3, 0, 2]


def make(name, strides, **options):
    options.setdefault("finest_scale", 14)
    roi_layer = dict(type=name, output_size=3) | options.pop("roi_layer", {})
    return MODELS.build(
        dict(type="DkRoIExtractor", roi_layer=roi_layer, out_channels=CHANNELS, featmap_strides=strides, **options)
    )


def maps(strides, **options):
    return tuple(torch.randn(2, CHANNELS, 128 // stride, 192 // stride, **options) for stride in strides)


def wake(extractor):
    """Gives layers that have learned something, each something else."""
    for parameter in extractor.parameters():
        nn.init.normal_(parameter, std=0.3)
    return extractor


@rows
def test_registered(row):
    assert row.name in MODELS and row.name in ROOT_MODELS


def test_name_with_its_scope():
    layer = make("mmdet.DkDeformRoIPool", [16]).roi_layers[0]
    assert type(layer) is DeformRoIPool and layer.output_channels == CHANNELS


@rows
@strides_
@pytest.mark.parametrize("shared", (True, False))
def test_each_roi_is_pooled_by_the_layer_of_its_level(row, strides, shared):
    extractor, feats = wake(make(row.name, strides, share_levels=shared)), maps(strides)
    layers = extractor.roi_layers
    assert {type(layer) for layer in layers} == {row.layer}
    assert len(layers) == (1 if shared else len(strides))
    output = extractor(feats, ROIS)
    assert output.shape == (5, CHANNELS, 3, 3)
    for i, level in enumerate(LEVELS if len(strides) > 1 else [0] * 5):
        layer = layers[0 if shared else level]
        expected = layer(feats[level], ROIS[i : i + 1], spatial_scale=1 / strides[level])
        torch.testing.assert_close(output[i : i + 1], expected)
        if not shared:
            assert layer.spatial_scale == 1 / strides[level]


@at_rest
@strides_
@pytest.mark.parametrize("ratio", (0, 2))
@pytest.mark.parametrize("factor", (None, 1.3))
def test_at_rest_it_pools_as_mmdet_does(name, share, strides, ratio, factor):
    extractor = make(name, strides, roi_layer=dict(sampling_ratio=ratio))
    roi_align = dict(type="RoIAlign", output_size=3, sampling_ratio=ratio)
    rigid = SingleRoIExtractor(roi_align, CHANNELS, strides, finest_scale=14)
    feats = maps(strides)
    if factor and len(strides) == 1:
        factor = None  # MMDetection leaves RoIs as they are where there is one level
    expected = share * rigid(feats, ROIS, factor)
    torch.testing.assert_close(extractor(feats, ROIS, factor), expected)


@rows
@strides_
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("rois", (ROIS[:0], ROIS[[1, 3]]), ids=("no RoIs", "RoIs of one level"))
def test_every_parameter_and_map_has_a_gradient(row, strides, shared, rois):
    extractor, feats = wake(make(row.name, strides, share_levels=shared)), maps(strides, requires_grad=True)
    output = extractor(feats, rois)
    assert output.shape == (len(rois), CHANNELS, 3, 3)
    output.square().sum().backward()
    for level, feat in enumerate(feats):
        assert bool(feat.grad.any()) == (level == 0 and len(rois) > 0)
    for name, parameter in extractor.named_parameters():
        learns = len(rois) > 0 and name.startswith("roi_layers.0")
        assert bool(parameter.grad.any()) == learns, name


def test_one_branch_for_all_levels():
    # Table 1 of Deformable ConvNets v2: deformable RoI pooling adds 1.2M parameters, also with FPN.
    for row, number in ((ROWS[0], (256 * 49 + 1) * 98), (ROWS[1], (256 * 49 + 1) * 1024 + 1025 * 147)):
        layer = dict(type=row.name, output_size=7)
        with torch.device("meta"):
            shared = DkRoIExtractor(layer, 256, [4, 8, 16, 32])
            separate = DkRoIExtractor(layer, 256, [4, 8, 16, 32], share_levels=False)
        assert sum(p.numel() for p in shared.parameters()) == number
        assert sum(p.numel() for p in separate.parameters()) == 4 * number


def test_level_of_a_roi_without_area():
    strides = [4, 8, 16, 32]
    extractor, feats = wake(make("DkDeformRoIPool", strides)), maps(strides)
    rois = ROIS.clone()
    rois[2] = torch.tensor([0, 50.0, 10.0, 30.0, 40.0])  # its width is negative, its scale not a number
    changed, output = extractor(feats, rois), extractor(feats, ROIS)
    assert changed[2].isfinite().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(changed[others], output[others])


@at_rest
def test_rois_keep_their_precision(name, share):
    # bfloat16 knows steps of 8 pixels here; MMDetection's extractor rounds RoIs to the type of the maps.
    extractor, feats = make(name, [4]), (torch.randn(1, CHANNELS, 8, 512).bfloat16(),)
    rois = torch.tensor([[0, 1500.6, 2.0, 1530.9, 28.0]])
    expected = extractor((feats[0].float(),), rois)
    with torch.autocast("cpu", torch.bfloat16):
        output = extractor(feats, rois)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.02)  # bfloat16 has 8 bits
    assert (extractor((feats[0].float(),), rois.bfloat16().float()) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("DkDeformRoIPool", "DeformRoIPoolPack"),
        ("DkModulatedDeformRoIPool", "ModulatedDeformRoIPoolPack"),
    ],
)
def test_checkpoints_of_mmcv(ours, theirs):
    strides, options = [4, 8], dict(deform_fc_channels=8)
    layer = dict(type=theirs, output_size=3, output_channels=CHANNELS, **options)
    peer = wake(SingleRoIExtractor(layer, CHANNELS, strides))
    extractor = make(ours, strides, share_levels=False, roi_layer=dict(branch="mmcv", **options))
    extractor.load_state_dict(peer.state_dict())
    assert list(extractor.state_dict()) == list(peer.state_dict())


def test_layers_of_mmcv_stay():
    strides = [4, 8, 16, 32]
    extractor, feats = make("RoIAlign", strides), maps(strides)
    rigid = SingleRoIExtractor(dict(type="RoIAlign", output_size=3), CHANNELS, strides, finest_scale=14)
    assert type(extractor.roi_layers[0]) is type(rigid.roi_layers[0])
    torch.testing.assert_close(extractor(feats, ROIS), rigid(feats, ROIS))


class Middle(nn.Module):
    """A RoI layer of a user: one value a channel, that of the map's first pixel."""

    def __init__(self, output_size, spatial_scale) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = (output_size, output_size), spatial_scale

    def forward(self, feat, rois):
        return feat[rois[:, 0].long(), :, :1, :1].expand(-1, -1, *self.output_size)


def test_layers_of_a_user(monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, "MyRoILayer", Middle)
    feats = maps([4, 8])
    for kind in ("MyRoILayer", Middle):
        extractor = make(kind, [4, 8])
        assert [layer.spatial_scale for layer in extractor.roi_layers] == [1 / 4, 1 / 8]
        assert torch.equal(extractor(feats, ROIS)[1, :, 0, 0], feats[0][1, :, 0, 0])
    assert type(make(DeformRoIPool, [4]).roi_layers[0]) is DeformRoIPool


@pytest.mark.parametrize(
    ("roi_layer", "error", "message"),
    [
        (dict(type="DeformPool"), TypeError, "type of roi_layer must be a RoI layer's class .* got 'DeformPool'"),
        (dict(type=None), TypeError, "got None"),
        (dict(type=7), TypeError, "got 7"),
        (dict(output_channels=8), ValueError, "output_channels of roi_layer must be out_channels=6, got 8"),
        (dict(branch="DCN"), ValueError, "DeformRoIPool: branch must be 'paper' or 'mmcv', got 'DCN'"),
        (dict(groups=2), TypeError, "groups"),
    ],
)
def test_wrong_layer(roi_layer, error, message):
    with pytest.raises(error, match=message):
        make("DkDeformRoIPool", [4, 8], roi_layer=roi_layer)


def test_wrong_number_of_maps():
    message = r"DkRoIExtractor: feats must have first_level \+ 2 maps, .*featmap_strides=\[8, 16\], got 1 \+ 1"
    extractor = make("DkDeformRoIPool", [8, 16], first_level=1)
    assert extractor.num_inputs == 3
    with pytest.raises(ValueError, match=message):
        extractor(maps([4, 8]), ROIS)


def test_first_level():
    extractor, feats = wake(make("DkDeformRoIPool", [16], first_level=1)), maps([4, 16])
    assert extractor.num_inputs == 2
    torch.testing.assert_close(extractor(feats, ROIS), extractor.roi_layers[0](feats[1], ROIS, spatial_scale=1 / 16))


# The detectors.


def data(objects):
    """A batch of one image of 64 x 96 pixels."""
    boxes = torch.tensor([[20.0, 10.0, 70.0, 50.0]])[:objects]
    masks = torch.zeros(1, 64, 96)
    masks[:, 10:50, 20:70] = 1
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0), pad_shape=(64, 96))
    )
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([1])[:objects], masks=BitmapMasks(masks[:objects].numpy(), 64, 96)
    )
    sample.ignored_instances = InstanceData(bboxes=torch.empty(0, 4), labels=torch.empty(0))
    return dict(inputs=[torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)], data_samples=[sample])


def losses_backward(model, batch):
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    model.zero_grad()
    total.backward()


@pytest.mark.parametrize("objects", (1, 0))
def test_box_and_mask_heads(objects):
    cfg = Config.fromfile(CONFIGS / "deformed_shapes/mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_1k_deformed-shapes.py")
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    branches = []
    for head in ("bbox", "mask"):
        (layer,) = getattr(model.roi_head, f"{head}_roi_extractor").roi_layers
        assert type(layer) is ModulatedDeformRoIPool
        assert not any(p.any() for p in layer.offset_fc[-1].parameters())  # init_weights left it at rest
        nn.init.normal_(layer.offset_fc[-1].weight, std=0.1)
        branches.append(layer.offset_fc[0].weight)
    losses_backward(model, data(objects))
    # An image without objects has no RoIs for the mask head, yet DistributedDataParallel waits for all gradients.
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [bool(branch.grad.any()) for branch in branches] == [True, objects == 1]


def small_dc5(leaf):
    cfg = Config.fromfile(CONFIGS / "dcnv2" / leaf)
    cfg.merge_from_dict(
        dict(
            model=dict(
                backbone=dict(base_channels=8, stem_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=False),
                neck=dict(in_channels=256, out_channels=16),
                rpn_head=dict(in_channels=128, feat_channels=16),
                roi_head=dict(
                    bbox_roi_extractor=dict(out_channels=16),
                    bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=2),
                ),
            )
        )
    )
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model, cfg


@pytest.mark.parametrize(("token", "factor"), [("dconv-c5_dc5_dpool", 0.01), ("mdconv-c3-c5_dc5_mdpool", 1)])
def test_proposals_from_conv4_regions_from_conv5(token, factor):
    model, cfg = small_dc5(f"faster-rcnn_r50-{token}_16e_coco.py")
    assert type(model.neck) is DkReduceLast and type(model.rpn_head) is DkSingleLevelRPNHead
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        conv4, conv5 = model.backbone(x)
        feats = model.extract_feat(x)
        assert [tuple(feat.shape) for feat in feats] == [(1, 128, 4, 6), (1, 16, 4, 6)]  # both of stride 16
        assert torch.equal(feats[0], conv4) and conv5.shape[1] == 256
        scores, deltas = model.rpn_head(feats)
        expected = RPNHead.forward_single(model.rpn_head, conv4)
        assert len(scores) == len(deltas) == 1
        assert torch.equal(scores[0], expected[0]) and torch.equal(deltas[0], expected[1])
        (layer,) = model.roi_head.bbox_roi_extractor.roi_layers
        rois = torch.tensor([[0, 10.0, 5.0, 80.0, 60.0]])
        pooled = model.roi_head._bbox_forward(feats, rois)["bbox_feats"]
        torch.testing.assert_close(pooled, layer(feats[1], rois, spatial_scale=1 / 16))

    model.train()
    losses_backward(model, data(1))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    with torch.no_grad():
        assert len(model.test_step(data(1))) == 1

    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = 0.1 if "conv_offset" in name else factor if "offset_fc" in name else 1
            assert rates[id(parameter)] == pytest.approx(cfg.optim_wrapper.optimizer.lr * expected), name
