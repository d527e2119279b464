"""Box averaging: the boxes that suppression keeps become means of those that it would throw away."""

import torch
from torch import Tensor
from torchvision.ops import box_iou


def average_boxes(
    kept: Tensor,
    kept_labels: Tensor,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    iou_threshold: float = 0.5,
    iterations: int = 1,
) -> Tensor:
    """Replaces each kept box by the mean of the boxes of its class that overlap it, weighted by their scores.

    This is the voting of "Object detection via a multi-region and semantic segmentation-aware CNN model" (Gidaris and
    Komodakis, 2015), which Deformable ConvNets (2017, Table 5) use on several views of an image. Scores and labels stay
    as they are.

    Args:
        kept: [k, 4], (x1, y1, x2, y2), what is left after suppression.
        kept_labels: [k].
        boxes: [n, 4], all boxes before it, those that are kept among them.
        scores: [n], not negative.
        labels: [n].
        iou_threshold: A box overlaps from this IoU on.
        iterations: How often this is done; from the second time on the boxes of the time before are replaced, so that
            others may overlap them.

    Returns:
        [k, 4]. A box that no other overlaps stays in its place.
    """
    same = kept_labels[:, None] == labels
    for _ in range(iterations):
        weights = scores * (same & (box_iou(kept, boxes) >= iou_threshold))  # [k, n]
        total = weights.sum(1, keepdim=True)
        kept = torch.where(total > 0, weights @ boxes / total, kept)
    return kept
