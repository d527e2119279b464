"""Parameters and FLOPs of Detectron2's detectors."""

import math
import os
from functools import partial

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN, StandardROIHeads
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes
from torch import nn

from dk_detection.complexity.counting import Part
from dk_detection.complexity.detectors import DetectorCounter, count_file, fixed_rois, zero_on_cpu
from dk_detection.detectron2.jobs import load_job
from dk_detection.errors import UserError


def count_config(path: str | os.PathLike, shape: tuple[int, int] = (800, 1200), rois: int = 1000) -> list[Part]:
    """Counts the detector of a config file on one image, by the rules of `dk_detection.mmdet.complexity`.

    Args:
        path: A config of Detectron2, YAML or LazyConfig.
        shape: (H, W) of the image. It is padded to what the backbone asks for, as Detectron2's FPN cannot do without.
        rois: RoIs that the box head sees. The mask head sees as many as the config keeps detections of an image.

    Returns:
        Parts from the backbone, its FPN with it, to the heads. What a forward pass does not use, such as a branch for
        training only, makes a last part, "not run".

    Raises:
        UserError: The file is no detector's config; its detector is of a kind that is not known here; the image is too
            small; or an operator computes no shapes on the meta device.
    """
    count = partial(count_detector, shape=shape, rois=rois)
    return count_file(path, lambda path: load_job(path).build_model("meta"), count)


def count_detector(detector: nn.Module, shape: tuple[int, int], rois: int) -> list[Part]:
    """Counts a detector that lies on the meta device; see `count_config`. Its RoI heads are on the CPU afterwards."""
    dense = isinstance(detector, DenseDetector)
    heads = getattr(detector, "roi_heads", None)
    if not dense and not (
        isinstance(detector, GeneralizedRCNN)
        and isinstance(detector.proposal_generator, RPN)
        and isinstance(heads, StandardROIHeads)
        and not isinstance(heads.box_head, nn.ModuleList)
        and not (heads.keypoint_on or hasattr(detector, "sem_seg_head"))
    ):
        raise UserError(
            "only dense detectors and those with an RPN and StandardROIHeads of one stage, for boxes and masks alone, "
            f"can be counted, got {type(detector).__name__}{f' with {type(heads).__name__}' if heads else ''}"
        )
    count = DetectorCounter(detector, ROIAlign)
    divisor = max(1, detector.backbone.size_divisibility)
    image = torch.zeros(1, 3, *(math.ceil(side / divisor) * divisor for side in shape), device="meta")
    maps = count("backbone", [detector.backbone], lambda: detector.backbone(image))
    if dense:
        count("dense head", [detector.head], lambda: detector.head([maps[name] for name in detector.head_in_features]))
        return count.finish()
    rpn = detector.proposal_generator
    count("RPN", [rpn], lambda: rpn.rpn_head([maps[name] for name in rpn.in_features]))

    heads = zero_on_cpu(heads)
    maps = {name: torch.zeros(value.shape) for name, value in maps.items()}
    boxes = fixed_rois(rois, shape)[:, 1:]
    predictor = heads.box_predictor

    def run_box_head():
        pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], [Boxes(boxes)])
        return predictor(heads.box_head(pooled))

    def run_mask_head():
        detections = Boxes(boxes[: predictor.test_topk_per_image])
        return heads.mask_head.layers(heads.mask_pooler([maps[name] for name in heads.mask_in_features], [detections]))

    count("box head", [heads.box_pooler, heads.box_head, predictor], run_box_head)
    if heads.mask_on:
        count("mask head", [heads.mask_pooler, heads.mask_head], run_mask_head)
    return count.finish()
