"""Parameters and FLOPs of MMDetection's detectors."""

import os

import torch
from mmcv.ops import RoIAlign
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from dk_detection.complexity.counting import Part, parameters
from dk_detection.complexity.detectors import DetectorCounter, count_file, fixed_rois, zero_on_cpu
from dk_detection.errors import UserError

# The parts that are run; a RoI head with others would be counted too low.
_ROI_HEAD_PARTS = {"bbox_roi_extractor", "bbox_head", "mask_roi_extractor", "mask_head", "shared_head"}


def count_config(path: str | os.PathLike, shape: tuple[int, int] = (800, 1200), rois: int = 1000) -> list[Part]:
    """Counts the detector of a config file on one image.

    Backbone, neck and dense heads run on the meta device. The RoI head runs on the CPU, on maps that are zero and on
    RoIs that are fixed, not on proposals, so that the count depends on nothing but the arguments.

    Args:
        path: A config of MMDetection.
        shape: (H, W) of the image, taken as it is: not padded to a multiple of the largest stride.
        rois: RoIs that the box head sees. The mask head sees as many as the config keeps detections of an image.

    Returns:
        Parts from the backbone to the heads. What a forward pass does not use, such as a branch for training only,
        makes a last part, "not run".

    Raises:
        UserError: The file is no detector's config; its detector is of a kind that is not known here; the image is too
            small; or an operator computes no shapes on the meta device.
    """
    return count_file(path, _build, lambda detector: count_detector(detector, shape, rois))


def _build(path: str) -> nn.Module:
    cfg = Config.fromfile(path)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    return MODELS.build(cfg.model)


def count_detector(detector: nn.Module, shape: tuple[int, int], rois: int) -> list[Part]:
    """Counts a detector that lies on the meta device; see `count_config`. Its RoI head is on the CPU afterwards."""
    single_stage = isinstance(detector, SingleStageDetector)
    if not single_stage and not (
        isinstance(detector, TwoStageDetector)
        and detector.with_rpn
        and isinstance(getattr(detector, "roi_head", None), StandardRoIHead)
    ):
        raise UserError(
            "only single-stage detectors and two-stage ones with an RPN and a StandardRoIHead can be counted, got "
            f"{type(detector).__name__}"
        )
    count = DetectorCounter(detector, RoIAlign)
    maps = count("backbone", [detector.backbone], lambda: detector.backbone(torch.zeros(1, 3, *shape, device="meta")))
    if detector.with_neck:
        maps = count("neck", [detector.neck], lambda: detector.neck(maps))
    if single_stage:
        count("dense head", [detector.bbox_head], lambda: detector.bbox_head(maps))
        return count.finish()
    count("RPN", [detector.rpn_head], lambda: detector.rpn_head(maps))

    children = detector.roi_head.named_children()
    extra = {name for name, child in children if parameters(child)} - _ROI_HEAD_PARTS
    if extra:
        raise UserError(
            f"a RoI head with more than boxes and masks cannot be counted, got {type(detector.roi_head).__name__} with "
            f"{', '.join(sorted(extra))}"
        )
    head = zero_on_cpu(detector.roi_head)
    maps = [torch.zeros(each.shape) for each in maps]
    boxes = fixed_rois(rois, shape)
    shared = head.shared_head if head.with_shared_head else None
    count("box head", [head.bbox_roi_extractor, shared, head.bbox_head], lambda: head._bbox_forward(maps, boxes))
    if head.with_mask:
        detections = boxes[: head.test_cfg.max_per_img]
        modules = [head.mask_roi_extractor, shared, head.mask_head]  # the extractor may be the box head's
        count("mask head", modules, lambda: head._mask_forward(maps, rois=detections))
    return count.finish()
