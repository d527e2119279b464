"""Test-time augmentation: what comes out of one view is what the detector says, and of several what it should be."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope

import dk_detection.mmdet  # noqa: F401  (registers the model)
from dk_detection.evaluation.box_averaging import average_boxes

ROOT = Path(__file__).parents[2]
SHAPE = (90, 128)
LOAD = dict(type="LoadImageFromFile")
PACK = dict(
    type="PackDetInputs",
    meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction"),
)
FLIPS = {
    "no": dict(type="RandomFlip", prob=0.0),
    **{name: dict(type="RandomFlip", prob=1.0, direction=name) for name in ("horizontal", "vertical", "diagonal")},
}


def resize(factor: float) -> dict:
    return dict(type="Resize", scale=tuple(round(factor * side) for side in (SHAPE[1], SHAPE[0])), keep_ratio=False)


@pytest.fixture(scope="module")
def detector():
    """A small Mask R-CNN with random weights, that is sure of nothing and so predicts a lot."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / "configs/mmdet/deformed_shapes/mask-rcnn_r18_fpn_1k_deformed-shapes.py")
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=12)
    cfg.model.test_cfg.rpn.update(max_per_img=40)
    return MODELS.build(cfg.model).eval()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, SHAPE[::-1], interpolation=cv2.INTER_CUBIC))
    return path


def predict(model, path, *steps):
    data = pseudo_collate([Compose([LOAD, *steps])(dict(img_path=str(path), img_id=1))])
    with torch.no_grad():
        return model.test_step(data)[0].pred_instances


def augmented(detector, path, factors=(1.0,), flips=("no",), **options):
    model = MODELS.build(
        dict(
            type="DkTTAModel",
            module=detector,
            tta_cfg=ConfigDict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=20, **options),
        )
    )
    views = [[resize(factor) for factor in factors], [FLIPS[flip] for flip in flips], [PACK]]
    return predict(model, path, dict(type="TestTimeAug", transforms=views))


def test_one_view_is_the_plain_prediction(detector, image):
    plain = predict(detector, image, resize(1.0), FLIPS["no"], PACK)
    one = augmented(detector, image)
    assert len(plain) == len(one) > 5 and plain.masks.any()
    torch.testing.assert_close(one.bboxes, plain.bboxes)
    torch.testing.assert_close(one.scores, plain.scores)
    assert one.labels.equal(plain.labels)
    assert (one.masks == plain.masks).float().mean() > 0.9999  # probabilities go through a logarithm


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_a_mirrored_view_is_mirrored_back(detector, image, tmp_path, direction):
    axes = {"horizontal": (1,), "vertical": (0,), "diagonal": (0, 1)}[direction]
    cv2.imwrite(str(tmp_path / "mirrored.png"), np.flip(cv2.imread(str(image)), axes))
    plain = predict(detector, tmp_path / "mirrored.png", resize(1.0), FLIPS["no"], PACK)
    view = augmented(detector, image, flips=[direction])
    boxes = plain.bboxes.clone()
    for axis in axes:
        boxes[:, [1 - axis, 3 - axis]] = SHAPE[axis] - plain.bboxes[:, [3 - axis, 1 - axis]]
    torch.testing.assert_close(view.bboxes, boxes)
    masks = plain.masks.flip([axis + 1 for axis in axes])
    assert (view.masks == masks).float().mean() > 0.999


def test_several_views(detector, image):
    factors, flips = (0.75, 1.5), ("no", "horizontal")
    joined = augmented(detector, image, factors, flips)
    views = [augmented(detector, image, [factor], [flip]) for factor in factors for flip in flips]
    boxes = torch.cat([view.bboxes for view in views])
    scores = torch.cat([view.scores for view in views])
    assert len(joined) == 20 and joined.masks.shape == (20, *SHAPE)
    nearest = torch.cdist(joined.bboxes, boxes).argmin(1)
    torch.testing.assert_close(joined.bboxes, boxes[nearest])
    torch.testing.assert_close(joined.scores, scores[nearest])
    assert not joined.masks.equal(views[0].masks)

    labels = torch.cat([view.labels for view in views])
    averaged = augmented(detector, image, factors, flips, box_averaging=dict(iou_threshold=0.5, iterations=2))
    expected = average_boxes(joined.bboxes, joined.labels, boxes, scores, labels, iou_threshold=0.5, iterations=2)
    torch.testing.assert_close(averaged.bboxes, expected)
    assert averaged.scores.equal(joined.scores) and averaged.labels.equal(joined.labels)
    assert not torch.allclose(averaged.bboxes, joined.bboxes) and averaged.masks.shape == joined.masks.shape


def test_nothing_found(detector, image):
    threshold = detector.roi_head.test_cfg.score_thr
    try:
        detector.roi_head.test_cfg.score_thr = 1.0
        empty = augmented(detector, image, flips=["no", "horizontal"], box_averaging=dict())
    finally:
        detector.roi_head.test_cfg.score_thr = threshold
    assert len(empty) == 0 and empty.masks.shape == (0, *SHAPE)


def test_detectors_without_masks(image):
    init_default_scope("mmdet")
    cfg = Config.fromfile(ROOT / "configs/mmdet/deformed_shapes/mask-rcnn_r18_fpn_1k_deformed-shapes.py").model
    cfg.type = "FasterRCNN"
    cfg.test_cfg.rcnn.update(score_thr=0.0, max_per_img=12)
    del cfg.roi_head.mask_head, cfg.roi_head.mask_roi_extractor
    detector = MODELS.build(cfg).eval()
    plain = predict(detector, image, resize(1.0), FLIPS["no"], PACK)
    one = augmented(detector, image, box_averaging=dict())
    assert one.labels.equal(plain.labels) and "masks" not in one


def test_the_base_file_has_the_sides_of_the_paper(image):
    cfg = Config.fromfile(ROOT / "configs/mmdet/_base_/multi_scale_testing.py")
    init_default_scope("mmdet")
    views = Compose(cfg.tta_pipeline)(dict(img_path=str(image), img_id=1))
    assert [min(view.shape[1:]) for view in views["inputs"][::2]] == [480, 576, 688, 864, 1200, 1400]
    assert [sample.flip for sample in views["data_samples"]] == [False, True] * 6
