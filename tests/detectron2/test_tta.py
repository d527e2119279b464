"""Test-time augmentation: what comes out of one view is what the detector says, and boxes are averaged on request."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import GeneralizedRCNNWithTTA
from omegaconf import OmegaConf

from dk_detection.detectron2 import add_dk_config
from dk_detection.detectron2.tta import DEFAULTS, DkRCNNWithTTA, tta_of_lazy_config, tta_of_yaml
from dk_detection.errors import UserError
from dk_detection.evaluation.box_averaging import average_boxes

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="module")
def detector():
    """A small Mask R-CNN with random weights, that is sure of nothing and so predicts a lot."""
    stem = "mask-rcnn_r18_fpn_1k_deformed-shapes"
    model = LazyConfig.load(str(ROOT / f"configs/detectron2/deformed_shapes/{stem}.py")).model
    model.roi_heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=12)
    torch.manual_seed(0)
    return instantiate(model).eval()


@pytest.fixture(scope="module")
def image():
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 13), (HEIGHT, WIDTH), mode="bilinear")[0]
    return dict(image=(255 * noise).byte(), height=HEIGHT, width=WIDTH)


def predict(model, image):
    with torch.no_grad():
        return model([image])[0]["instances"]


def views(detector, **settings) -> DkRCNNWithTTA:
    return tta_of_lazy_config(OmegaConf.create(dict(max_size=400, **settings)), detector)


def test_one_view_is_the_plain_prediction(detector, image):
    plain, one = predict(detector, image), predict(views(detector, min_sizes=[HEIGHT], flip=False), image)
    assert len(plain) == len(one) == 12
    torch.testing.assert_close(one.pred_boxes.tensor, plain.pred_boxes.tensor)
    assert one.pred_masks.equal(plain.pred_masks) and one.pred_classes.equal(plain.pred_classes)


def test_boxes_are_averaged(detector, image):
    settings = dict(min_sizes=[HEIGHT, 144], flip=True)
    joined = predict(views(detector, **settings), image)
    options = dict(iou_threshold=0.4, iterations=2)
    model = views(detector, **settings, box_averaging=options)
    everything = {}

    def keep(boxes, scores, classes, shape):
        everything.update(boxes=boxes, scores=torch.stack(scores), labels=torch.stack(classes))
        return DkRCNNWithTTA._merge_detections(model, boxes, scores, classes, shape)

    model._merge_detections = keep
    averaged = predict(model, image)
    expected = average_boxes(joined.pred_boxes.tensor, joined.pred_classes, **everything, **options)
    torch.testing.assert_close(averaged.pred_boxes.tensor, expected)
    assert not torch.allclose(averaged.pred_boxes.tensor, joined.pred_boxes.tensor)
    assert averaged.scores.equal(joined.scores) and averaged.pred_masks.shape == joined.pred_masks.shape


def test_nothing_found(detector, image):
    predictor = detector.roi_heads.box_predictor
    threshold = predictor.test_score_thresh
    try:
        predictor.test_score_thresh = 1.0
        empty = predict(views(detector, min_sizes=[HEIGHT], box_averaging=dict(iterations=1)), image)
    finally:
        predictor.test_score_thresh = threshold
    assert len(empty) == 0


def test_settings(detector):
    """A LazyConfig without any has the sides of the paper; in YAML averaging is off until it is asked for."""
    model = tta_of_lazy_config(OmegaConf.create(), detector)
    assert model.tta_mapper.min_sizes == DEFAULTS["min_sizes"] == [480, 576, 688, 864, 1200, 1400]
    assert model.tta_mapper.flip and model.box_averaging is None
    assert model.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 6 and model.cfg.TEST.DETECTIONS_PER_IMAGE == 12
    cfg = get_cfg()
    add_dk_config(cfg)
    assert tta_of_yaml(cfg, detector).box_averaging == dict(iterations=0, iou_threshold=0.5)
    cfg.merge_from_list(["TEST.AUG.BOX_AVERAGING.ITERATIONS", "2"])
    assert tta_of_yaml(cfg, detector).box_averaging["iterations"] == 2
    assert issubclass(DkRCNNWithTTA, GeneralizedRCNNWithTTA)


def test_detector_of_another_kind():
    with pytest.raises(UserError, match="test-time augmentation is for a GeneralizedRCNN, this is a Linear"):
        DkRCNNWithTTA(get_cfg(), torch.nn.Linear(1, 1))
