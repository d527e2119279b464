"""The same weights give the same detector in both frameworks."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from dk_detection.checkpoint_names import to_detectron2, to_mmdet
from dk_detection.detectron2 import DkAlignedInceptionResNet, DkDeformable, DkResNetDW
from dk_detection.layers.table import TABLE

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 64, 96
# Both detectors get the same normalised images, and RoIs of all levels.
IMAGES = torch.Generator().manual_seed(3)
ROIS = torch.tensor([[4.0, 6, 20, 18], [10, 3, 70, 50], [0, 0, 96, 64], [60, 40, 75, 60]])


def mmdet_config(stem: str) -> Config:
    return Config.fromfile(next((ROOT / "configs" / "mmdet").rglob(f"{stem}.py")))


def mmdet_model(cfg):
    init_default_scope("mmdet")
    for part in (cfg.model.backbone, cfg.model):
        part.pop("init_cfg", None)
    return disturb(MODELS.build(cfg.model)).eval()


def detectron2_model(stem: str):
    cfg = LazyConfig.load(str(next((ROOT / "configs" / "detectron2").rglob(f"{stem}.py"))))
    return cfg.model


def disturb(model):
    """Weights and statistics as if it had learned something."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            value.uniform_(-0.2, 0.2)
        elif re.search(r"offset|routing|attention", name):
            value.normal_(std=0.02)
    return model


SMALL = "mask-rcnn_r18{}_fpn_1k_deformed-shapes"
CASES = {
    "mdconv": (SMALL.format("-mdconv-c3-c5"), SMALL.format("-mdconv-c3-c5"), None),
    **{
        row.token: (SMALL.format(""), SMALL.format(""), row.token)
        for row in TABLE
        if row.kind == "conv" and row.token != "mdconv"
    },
}


def exchanged(cfg, model, token):
    """The small detector with another layer, in both frameworks."""
    if token:
        cfg.model.backbone.update(
            type="DkDeformable", network="ResNet", exchange=[dict(layer=token, select="layer[234].*.conv[12]")]
        )
        exchange = [dict(layer=token, select="backbone.bottom_up.res[345].*.conv[12]")]
        model = dict(_target_=DkDeformable, network=model, exchange=exchange)
    return cfg, model


def narrow_dc5(cfg, model):
    """The Faster R-CNN with dilated conv5, a block a stage."""
    for stage in model.network.backbone.bottom_up.stages if "network" in model else model.backbone.bottom_up.stages:
        stage.num_blocks = 1
        stage.stride_per_block = stage.stride_per_block[:1]
    return cfg, model


def compare(mm, d2):
    """Feature maps, the RPN's outputs, RoI features and what the heads make of them, to 1e-4."""
    x = torch.randn(2, 3, HEIGHT, WIDTH, generator=IMAGES)
    with torch.no_grad():
        theirs = mm.extract_feat(x)
        ours = d2.backbone(x)
        for name, a, b in zip(ours, ours.values(), theirs, strict=True):
            close(a, b, name)

        rpn = d2.proposal_generator
        logits, deltas = rpn.rpn_head([ours[name] for name in rpn.in_features])
        scores, offsets = mm.rpn_head(theirs)
        generator = mm.rpn_head.prior_generator
        sizes, ratios = len(generator.scales), len(generator.ratios)
        for level in range(len(logits)):
            close(logits[level], regroup(scores[level], ratios, sizes, 1), f"logits of level {level}")
            close(deltas[level], regroup(offsets[level], ratios, sizes, 4), f"deltas of level {level}")

        boxes = [ROIS, ROIS.flip(0)]
        heads = d2.roi_heads
        pooled = heads.box_pooler([ours[name] for name in heads.box_in_features], [Boxes(one) for one in boxes])
        result = mm.roi_head._bbox_forward(theirs, bbox2roi(boxes))
        close(pooled, result["bbox_feats"], "RoI features")
        scores, deltas = heads.box_predictor(heads.box_head(pooled))
        close(scores, result["cls_score"], "class scores")
        close(deltas, result["bbox_pred"], "boxes")
        if heads.mask_on:
            pooled = heads.mask_pooler([ours[name] for name in heads.mask_in_features], [Boxes(one) for one in boxes])
            close(
                heads.mask_head.layers(pooled),
                mm.roi_head._mask_forward(theirs, bbox2roi(boxes))["mask_preds"],
                "masks",
            )


def regroup(value, ratios, sizes, per_anchor):
    n, _, *size = value.shape
    return value.view(n, ratios, sizes, per_anchor, *size).transpose(1, 2).reshape(n, -1, *size)


def close(ours, theirs, what):
    assert ours.shape == theirs.shape, what
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1), what


def load(d2, mm, tmp_path):
    """MMDetection's weights into Detectron2's detector, by its checkpointer; nothing may be left over."""
    path = tmp_path / "converted.pth"
    torch.save({"model": to_detectron2(mm.state_dict())}, path)
    found = []
    checkpointer = DetectionCheckpointer(d2)
    checkpointer._log_incompatible_keys = found.append
    checkpointer.load(str(path))
    assert found == [([], [], [])]
    return d2.eval()


@pytest.mark.parametrize(("mmdet_stem", "detectron2_stem", "token"), CASES.values(), ids=CASES.keys())
def test_small_mask_rcnn(tmp_path, mmdet_stem, detectron2_stem, token):
    cfg, model = exchanged(mmdet_config(mmdet_stem), detectron2_model(detectron2_stem), token)
    mm = mmdet_model(cfg)
    d2 = load(instantiate(model), mm, tmp_path)
    compare(mm, d2)
    back = to_mmdet(d2.state_dict())
    state = {name: value for name, value in mm.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert back.keys() == state.keys()
    assert all(back[name].equal(state[name]) for name in state)
    mm.load_state_dict(back, strict=True)  # what lacks num_batches_tracked counts as whole


def test_dilated_conv5_with_deformable_pooling(tmp_path):
    """Anchors have five sizes on one map there, and the frameworks order them differently."""
    stem = "faster-rcnn_r50-mdconv-c3-c5_dc5_mdpool_16e_coco"
    cfg, model = narrow_dc5(mmdet_config(stem), detectron2_model(stem))
    mm = mmdet_model(cfg)
    for number in range(1, 5):
        stage = getattr(mm.backbone, f"layer{number}")
        del stage[1:]
    d2 = load(instantiate(model), mm, tmp_path)
    compare(mm, d2)
    back = to_mmdet(d2.state_dict())
    assert all(value.equal(mm.state_dict()[name]) for name, value in back.items())


@pytest.mark.parametrize(
    ("stem", "network"),
    [
        ("faster-rcnn_r50-dw-dk-gdk-1x1_fpn_1x_coco", DkResNetDW),
        ("faster-rcnn_air-dconv-c5_dc5_dpool_240k_coco", DkAlignedInceptionResNet),
    ],
)
def test_our_backbone(tmp_path, stem, network):
    cfg, model = mmdet_config(stem), detectron2_model(stem)
    cfg.model.backbone.blocks = (1, 1, 1, 1)
    model.network.backbone.bottom_up.blocks = (1, 1, 1, 1)
    mm = mmdet_model(cfg)
    d2 = load(instantiate(model), mm, tmp_path)
    assert isinstance(d2.backbone.bottom_up, network)
    compare(mm, d2)
    back = to_mmdet(d2.state_dict())
    assert all(value.equal(mm.state_dict()[name]) for name, value in back.items())


@pytest.mark.parametrize("stem", ["rfcn_r50_dc5", "rfcn_r50-dconv-c5_dc5_dpspool"])
def test_rfcn(tmp_path, stem):
    cfg, model = narrow_dc5(mmdet_config(f"{stem}_1k_deformed-shapes"), detectron2_model(f"{stem}_1k_deformed-shapes"))
    mm = mmdet_model(cfg)
    for number in range(1, 5):
        stage = getattr(mm.backbone, f"layer{number}")
        del stage[1:]
    d2 = load(instantiate(model), mm, tmp_path)
    compare(mm, d2)
    back = to_mmdet(d2.state_dict())
    assert all(value.equal(mm.state_dict()[name]) for name, value in back.items())


@pytest.mark.parametrize("stem", ["class-aware-rpn_r50_dc5", "class-aware-rpn_r50-dconv-c5_dc5"])
def test_class_aware_rpn(tmp_path, stem):
    """What the heads give, and then the losses and the detections that each framework makes of it."""
    cfg, model = narrow_dc5(mmdet_config(f"{stem}_1k_deformed-shapes"), detectron2_model(f"{stem}_1k_deformed-shapes"))
    cfg.model.test_cfg.score_thr = model.get("network", model).test_score_thresh = 0.0
    # All anchors are learned from: the samples are drawn at random.
    cfg.model.train_cfg.sampler.update(num=10000, pos_fraction=1.0)
    model.get("network", model).update(batch_size_per_image=10000, positive_fraction=1.0)
    mm = mmdet_model(cfg)
    for number in range(1, 5):
        stage = getattr(mm.backbone, f"layer{number}")
        del stage[1:]
    mm.bbox_head.rpn_cls.weight.data.normal_(std=0.5)
    d2 = load(instantiate(model), mm, tmp_path)
    x = torch.randn(2, 3, HEIGHT, WIDTH, generator=IMAGES)
    boxes = torch.tensor([[10.0, 12, 40, 43], [50, 20, 72, 40]])
    with torch.no_grad():
        theirs, ours = mm.extract_feat(x), d2.backbone(x)
        close(ours["res5"], theirs[0], "conv5")
        features = [ours["res5"]]
        found = d2.head(features)
        scores, offsets = mm.bbox_head(theirs)
        for part, a, b, width in (("scores", found[0], scores, 7), ("boxes", found[1], offsets, 4)):
            close(a[0], regroup(b[0], 3, 3, width), part)

        size = (HEIGHT, WIDTH)
        d2.training = True
        truth = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.tensor([4, 1]))
        with EventStorage():
            losses = d2.forward_training(None, features, found, [truth, truth])
        truth = InstanceData(bboxes=boxes, labels=torch.tensor([4, 1]))
        metas = [dict(img_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))] * 2
        expected = mm.bbox_head.loss_by_feat(scores, offsets, [truth, truth], metas)
        close(losses["loss_cls"], expected["loss_cls"][0], "loss of the classes")
        close(losses["loss_box_reg"], expected["loss_bbox"][0], "loss of the boxes")
        assert expected["loss_bbox"][0] > 0

        images = ImageList(x, [size, size])
        detections = d2.forward_inference(images, features, found)
        expected = mm.bbox_head.predict_by_feat(scores, offsets, batch_img_metas=metas)
        for a, b in zip(detections, expected, strict=True):
            assert len(a) == len(b) > 10
            close(a.scores, b.scores, "scores")
            assert a.pred_classes.equal(b.labels)
            close(a.pred_boxes.tensor, b.bboxes, "detections")
    back = to_mmdet(d2.state_dict())
    assert all(value.equal(mm.state_dict()[name]) for name, value in back.items())


@pytest.mark.parametrize(
    "stem", sorted(path.stem for path in (ROOT / "configs" / "detectron2" / "deformed_shapes").glob("*.py"))
)
def test_both_see_the_same_colours(stem):
    """Of those that start from nothing; pretrained weights want their own."""
    theirs = mmdet_config(stem).model.data_preprocessor
    cfg = LazyConfig.load(str(next((ROOT / "configs" / "detectron2").rglob(f"{stem}.py"))))
    model = cfg.model.get("network", cfg.model)
    assert model.input_format == cfg.dataloader.train.mapper.image_format == cfg.dataloader.test.mapper.image_format
    assert (model.input_format == "RGB") == theirs.bgr_to_rgb
    assert list(model.pixel_mean) == theirs.mean and list(model.pixel_std) == theirs.std
