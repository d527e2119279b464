"""Anchors of which only those within the image are learned from."""

from collections.abc import Callable

import torch
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

Labels = tuple[list[Tensor], list[Tensor]]


def label_inside(
    label: Callable[[list[Boxes], list[Instances]], Labels],
    anchors: list[Boxes],
    gt_instances: list[Instances],
    boundary: float,
) -> Labels:
    """Labels the anchors within each image as if there were no others.

    Args:
        label: From the anchors of all levels and N images to labels [R] and matched boxes [R, 4] of each image.
        anchors: Of each level.
        gt_instances: Of each image.
        boundary: Pixels by which an anchor may be out of the image; below 0: any number.

    Returns:
        What `label` gives; -1 and zeros for the other anchors.
    """
    if boundary < 0:
        return label(anchors, gt_instances)
    every, labels, boxes = Boxes.cat(anchors), [], []
    for image in gt_instances:
        inside = every.inside_box(image.image_size, boundary)
        (found,), (matched,) = label([every[inside]], [image])
        labels.append(found.new_full((len(every),), -1).masked_scatter(inside, found))
        boxes.append(matched.new_zeros(len(every), 4).masked_scatter(inside[:, None], matched))
    return labels, boxes


@PROPOSAL_GENERATOR_REGISTRY.register()
class DkRPN(RPN):
    """A region proposal network that learns from the anchors within the image only (Faster R-CNN, 2015, Section 3.3).

    `RPN` with `anchor_boundary_thresh` of 0 or more matches objects with all anchors and then drops those that are
    further out of the image, so that an object at the border may be left without any. This one matches it with the best
    of those that stay, as MMDetection does with `allowed_border`. Arguments are those of `RPN`.
    """

    @torch.no_grad()
    def label_and_sample_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> Labels:
        """1, 0 or, where it is not sampled, -1 for each anchor, and the matched boxes; as `RPN`'s."""
        return label_inside(super().label_and_sample_anchors, anchors, gt_instances, self.anchor_boundary_thresh)
