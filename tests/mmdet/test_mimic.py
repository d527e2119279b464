"""R-CNN feature mimicking in whole detectors: what it adds in training, and that nothing of it is left afterwards."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import DATASETS, MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import load_state_dict

from dk_detection.errors import UserError
from dk_detection.mimicking import FeatureMimicking, crop_patches
from dk_detection.mmengine.checkpoints import check_fits

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "mmdet"
PATCH = 48

SMALL_RESNET = dict(base_channels=8, stem_channels=8, init_cfg=None)
SMALL_RCNN = dict(
    rpn_proposal=dict(nms_pre=50, max_per_img=20),
    rcnn=dict(sampler=dict(num=24)),
)


def small(stem: str, neck: dict, in_rpn: int, channels: int = 16, **mimic) -> Config:
    """The model of one of our configs with fewer channels, proposals and smaller patches."""
    cfg = Config.fromfile(CONFIGS / f"{stem}.py")
    extractor, head = dict(out_channels=channels), dict(in_channels=channels)
    roi_head = dict(bbox_roi_extractor=extractor, bbox_head=dict(fc_out_channels=24, num_classes=3, **head))
    if "mask_head" in cfg.model.roi_head:
        roi_head |= dict(mask_roi_extractor=extractor, mask_head=dict(num_convs=1, conv_out_channels=8, num_classes=3))
        roi_head["mask_head"] |= head
    options = dict(
        backbone=SMALL_RESNET,
        neck=dict(out_channels=channels, **neck),
        rpn_head=dict(in_channels=in_rpn, feat_channels=16),
        roi_head=roi_head,
        train_cfg=SMALL_RCNN,
        test_cfg=dict(rcnn=dict(score_thr=0.0)),
        mimic=dict(patch_size=PATCH, **mimic),
    )
    cfg.merge_from_dict(dict(model=options))
    return cfg


# Mask R-CNN on a pyramid with rigid layers and frozen normalisations; Faster R-CNN on conv5 with modulated deformable
# convolution and pooling; Mask R-CNN with both, whose normalisations learn.
DETECTORS = {
    "fpn": ("dcnv2/mask-rcnn_r50_fpn_mimic_16e_coco", dict(in_channels=[32, 64, 128, 256]), 16),
    "c5": ("dcnv2/faster-rcnn_r50-mdconv-c3-c5_dc5_mdpool_mimic_16e_coco", dict(in_channels=256), 128),
    "norms learn": (
        "deformed_shapes/mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes",
        dict(in_channels=[8, 16, 32, 64]),
        16,
    ),
}
detectors = pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS.keys())


def build(cfg: Config, mimicking: bool = True):
    """The detector in training, its weights random everywhere; or the one that the config without mimicking builds."""
    init_default_scope("mmdet")
    options = copy.deepcopy(cfg.model)
    if not mimicking:
        options.type = "MaskRCNN" if "mask_head" in options.roi_head else "FasterRCNN"
        del options.mimic
    torch.manual_seed(0)
    model = MODELS.build(options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offset" in name or "bn3.weight" in name:  # at rest they would hide what lies behind them
                parameter.normal_(std=0.1)
    return model.train()


def batch(num_objects=(2, 1), size=(64, 96)) -> dict:
    shapes = [(3, *size)] * len(num_objects)
    return demo_mm_inputs(len(num_objects), shapes, num_items=list(num_objects), num_classes=3, with_mask=True)


def losses_of(model, data: dict) -> dict:
    torch.manual_seed(0)
    return model(**model.data_preprocessor(copy.deepcopy(data), True), mode="loss")


# In training


@detectors
def test_training(detector):
    """The losses count, the log shows them, gradients can be accumulated, and the model can be copied afterwards."""
    model = build(small(*detector))
    wrapper = build_optim_wrapper(
        model, dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01), accumulative_counts=2)
    )
    before = model.mimic.classifier.weight.detach().clone()
    logs = [model.train_step(batch(), wrapper) for _ in range(2)]
    for log in logs:
        assert {"loss_mimic", "loss_mimic_cls", "mimic_cosine"} <= log.keys()
        assert torch.isclose(log["loss"], sum(value for key, value in log.items() if "loss_" in key))
        assert torch.isclose(log["loss_mimic"], 0.1 * (1 - log["mimic_cosine"]), atol=1e-5)
    assert logs[0]["loss_mimic_cls"].isclose(logs[1]["loss_mimic_cls"], rtol=0.1)  # nothing was learned in between
    assert not torch.equal(model.mimic.classifier.weight, before)
    copy.deepcopy(model)


@pytest.mark.parametrize("detector", [DETECTORS["c5"], DETECTORS["norms learn"]], ids=["c5", "norms learn"])
def test_mixed_precision(detector, monkeypatch):
    """What AMP does but for the scaling of the loss: the whole detector under autocast, its weights in float32.

    On the CPU mmcv's RoI pooling does not know bfloat16, so both detectors pool by ours, and its NMS gets float32.
    """
    mmcv_nms = importlib.import_module("mmcv.ops.nms")  # mmcv.ops.nms itself is the function
    theirs = mmcv_nms.ext_module
    float32 = SimpleNamespace(nms=lambda boxes, scores, **options: theirs.nms(boxes.float(), scores.float(), **options))
    monkeypatch.setattr(mmcv_nms, "ext_module", float32)
    model = build(small(*detector))
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, batch())
    for name in ("loss_mimic", "loss_mimic_cls", "mimic_cosine"):
        assert losses[name].dtype == torch.float32 and losses[name].isfinite(), name
    model.parse_losses(losses)[0].backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in learning)
    assert model.mimic.classifier.weight.grad.any()


@detectors
@pytest.mark.parametrize("num_objects", [(0, 0), (0, 2)])
def test_images_without_objects(detector, num_objects):
    model = build(small(*detector))
    losses = losses_of(model, batch(num_objects))
    assert ("mimic_cosine" in losses) == (num_objects != (0, 0))
    if num_objects == (0, 0):
        assert losses["loss_mimic"] == losses["loss_mimic_cls"] == 0
    model.parse_losses(losses)[0].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@detectors
def test_the_branch_is_the_detector(detector):
    """The feature of a patch is the one that the detector itself has of an image that is the patch."""
    cfg = small(*detector)
    model, own = build(cfg), build(cfg, mimicking=False)
    load_state_dict(own, model.state_dict())
    own.eval()
    image = torch.randn(1, 3, 96, 128)
    patch = crop_patches(image, torch.tensor([[0.0, 11, 20, 90, 70]]), PATCH)
    rois = torch.tensor([[0.0, 0, 0, PATCH, PATCH]])
    with torch.no_grad():
        feature = model.mimic._extract(model._patch_features, patch)
        maps = own.extract_feat(patch)
        hidden = own.roi_head.bbox_roi_extractor(maps[: own.roi_head.bbox_roi_extractor.num_inputs], rois).flatten(1)
        for layer in own.roi_head.bbox_head.shared_fcs:
            hidden = layer(hidden).relu()
        scores = own.roi_head.bbox_head.fc_cls(hidden)
    assert feature.ne(0).any()
    assert torch.allclose(feature, hidden, rtol=1e-5, atol=1e-6)
    # and what is compared with it belongs to the same RoIs: the detector's own scores follow from it
    assert torch.allclose(own.roi_head._bbox_forward(maps, rois)["cls_score"], scores, rtol=1e-5, atol=1e-6)


def test_features_and_rois_belong_together():
    """What mimics is what the detector's classifier saw of that RoI."""
    model = build(small(*DETECTORS["c5"]))
    seen = {}
    model.mimic.register_forward_pre_hook(
        lambda _, arguments, named: seen.update(named, images=arguments[0]), with_kwargs=True
    )
    data = model.data_preprocessor(batch(), True)
    losses_of(model, batch())
    rois, labels, features = seen["rois"], seen["labels"], seen["features"]
    assert len(rois) == len(labels) == len(features) > 3
    assert torch.equal(seen["images"], data["inputs"])
    with torch.no_grad():
        again = model.roi_head.box_features(model.extract_feat(data["inputs"]), rois)
    assert torch.allclose(features, again, atol=1e-5)
    for i, sample in enumerate(data["data_samples"]):
        truth = sample.gt_instances
        for box, label in zip(rois[rois[:, 0] == i, 1:], labels[rois[:, 0] == i], strict=True):
            here = (truth.bboxes == box).all(1)  # the objects themselves are among the positive RoIs
            assert not here.any() or label in truth.labels[here]
    assert set(labels.tolist()) >= {3}


@pytest.mark.parametrize(("size", "level"), [(48, 0), (112, 1), (224, 2), (448, 3)])
def test_level_of_a_pyramid(size, level):
    """A 224 box belongs to the map of stride 16 (Feature Pyramid Networks, Eq. 1), so a patch of that size does."""
    model = build(small(*DETECTORS["fpn"]))
    used = []
    for i, layer in enumerate(model.roi_head.bbox_roi_extractor.roi_layers):
        layer.register_forward_hook(lambda *_, i=i: used.append(i))
    model.mimic.patch_size = size
    with torch.no_grad():
        model.mimic._extract(model._patch_features, torch.randn(1, 3, size, size))
    assert used == [level]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_running_statistics_do_not_learn_from_patches(chunk_size):
    cfg = small(*DETECTORS["norms learn"], chunk_size=chunk_size)
    model, own = build(cfg), build(cfg, mimicking=False)
    load_state_dict(own, model.state_dict())
    for network in (model, own):
        network.parse_losses(losses_of(network, batch()))[0].backward()
    ours = dict(model.named_buffers())
    assert any("running_mean" in name for name in ours)
    for name, value in own.named_buffers():
        assert torch.equal(ours[name], value), name
    assert all(module.training for module in model.modules())


# At inference


@detectors
def test_nothing_is_left_at_inference(detector):
    cfg = small(*detector)
    model, own = build(cfg), build(cfg, mimicking=False)
    ours, theirs = model.state_dict(), own.state_dict()
    assert ours.keys() - theirs.keys() == {"mimic.classifier.weight", "mimic.classifier.bias"}
    assert theirs.keys() <= ours.keys()

    load_state_dict(own, ours)
    model.mimic.register_forward_pre_hook(pytest.fail)
    results = []
    for network in (model, own):
        network.eval()
        with torch.no_grad():
            results.append([sample.pred_instances for sample in network.test_step(batch())])
    for a, b in zip(*results, strict=True):
        assert len(a) == len(b) > 0
        for key, value in a.items():
            assert torch.equal(value, b[key]), key


def test_checkpoints_fit_both_ways():
    cfg = small(*DETECTORS["c5"])
    model, own = build(cfg), build(cfg, mimicking=False)
    classifier = model.mimic.classifier.weight.detach().clone()
    ours, theirs = ({k: v + 1 if v.is_floating_point() else v for k, v in m.state_dict().items()} for m in (model, own))
    check_fits(model, dict(state_dict=ours), "a.pth")
    check_fits(own, dict(state_dict=ours), "a.pth")
    assert all(torch.equal(value, ours[key]) for key, value in own.state_dict().items())
    check_fits(model, dict(state_dict=theirs), "a.pth")
    assert torch.equal(model.mimic.classifier.weight, classifier)
    del theirs["roi_head.bbox_head.fc_cls.bias"]
    with pytest.raises(UserError, match=r"missing keys in source state_dict: roi_head\.bbox_head\.fc_cls\.bias"):
        check_fits(model, dict(state_dict=theirs), "a.pth")


# In several processes


# Objects on the image of each process, and options of the branch.
SCENARIOS = {
    "none in one process": ([2, 0], dict()),
    "uneven": ([1, 3], dict(regions="both", chunk_size=2)),
    "sum": ([1, 3], dict(reduction="sum")),
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("two_processes.py"), folder, repr(list(SCENARIOS.values()))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{i}.pth", weights_only=True) for i, name in enumerate(SCENARIOS)}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(gradients, scenario):
    """Two processes with an image each end an iteration and average to the gradients of one that has both images."""
    found = gradients[scenario]
    assert found["left out"] == []
    assert found["alone"].keys() == found["together"].keys()
    assert found["alone"]["backbone.layer3.0.conv1.weight"].ne(0).any()
    for name, expected in found["alone"].items():
        tolerance = 1e-9 * float(expected.abs().max()) + 1e-12  # sums in another order
        assert torch.allclose(found["together"][name], expected, rtol=0, atol=tolerance), name


# Wrong settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mimic=dict(regions="fg")), "FeatureMimicking: regions must be one of"),
        (dict(roi_head=dict(type="PISARoIHead")), "roi_head must be of type StandardRoIHead, got 'PISARoIHead'"),
        (dict(roi_head=dict(bbox_head=dict(with_cls=False))), "the box head must have a classifier fc_cls"),
        (dict(backbone=dict(with_cp=True)), "backbone has with_cp=True.*chunk_size"),
    ],
)
def test_wrong_settings(options, message):
    cfg = small(*DETECTORS["c5"])
    cfg.merge_from_dict(dict(model=options))
    with pytest.raises(ValueError, match=message):
        build(cfg)


def test_it_is_one_option():
    cfg = Config.fromfile(CONFIGS / "dcnv2" / "mask-rcnn_r50_fpn_mimic_16e_coco.py")
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert "mimic" not in cfg.model
    assert repr(model.mimic) == repr(FeatureMimicking(1024, 80))
    assert (model.mimic.regions, model.mimic.max_rois, model.mimic.patch_size) == ("foreground", 32, 224)


# Real images


def test_real_coco(tiny_coco):
    cfg = Config.fromfile(CONFIGS / "dcnv2" / "mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_mimic_16e_coco.py")
    init_default_scope("mmdet")
    cfg.train_dataloader.dataset.data_root = str(tiny_coco)
    cfg.train_dataloader.dataset.pipeline[2].scale = (320, 192)
    data = DATASETS.build(cfg.train_dataloader.dataset)
    options = dict(
        backbone=SMALL_RESNET | dict(frozen_stages=-1),
        neck=dict(in_channels=[32, 64, 128, 256]),
        train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
        mimic=dict(patch_size=64, max_rois=8),
    )
    cfg.merge_from_dict(dict(model=options))
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    log = model.train_step(pseudo_collate([data[0], data[1]]), wrapper)
    assert all(value.isfinite() for value in log.values()), log
    assert log["loss_mimic_cls"] > 0
    assert -1 <= log["mimic_cosine"] < 1
