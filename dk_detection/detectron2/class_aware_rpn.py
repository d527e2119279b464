"""Class-aware RPN in Detectron2: `RetinaNet`'s anchors and detections, an RPN's head and sampling, a softmax."""

import torch
from detectron2.layers import cat
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from dk_detection.detectron2.rpn import label_inside


class DkClassAwareRPNHead(StandardRPNHead):
    """The head of a region proposal network, with a score for each class and the background in place of one.

    Args:
        in_channels: Of the feature map.
        num_anchors: Anchors at a position.
        num_classes: Without the background.
        conv_dims: Channels of the 3x3 convolution.
    """

    def __init__(self, *, in_channels: int, num_anchors: int, num_classes: int, conv_dims=(512,)) -> None:
        super().__init__(in_channels=in_channels, num_anchors=num_anchors, conv_dims=conv_dims)
        hidden = self.objectness_logits.in_channels
        self.objectness_logits = nn.Conv2d(hidden, num_anchors * (num_classes + 1), 1)
        nn.init.normal_(self.objectness_logits.weight, std=0.01)
        nn.init.zeros_(self.objectness_logits.bias)


class DkClassAwareRPN(RetinaNet):
    """The detector that Deformable Convolutional Networks (2017, Section 2.3) calls category-aware RPN.

    A region proposal network whose anchors are sampled as there, and classified by a softmax over the classes and the
    background. Detections are `RetinaNet`'s: a threshold, the best ones, non-maximum suppression class by class. Its
    losses are means over the sampled anchors. A LazyConfig says::

        model = L(DkClassAwareRPN)(
            backbone=..., head=L(DkClassAwareRPNHead)(in_channels=1024, num_anchors=9, num_classes="${..num_classes}"),
            head_in_features=["res5"], num_classes=20, ...)

    Args:
        batch_size_per_image: Anchors of an image that are learned from.
        positive_fraction: How many of them are objects at most.
        anchor_boundary_thresh: Pixels by which an anchor that is learned from may be out of the image; below 0: any.
        options: Further arguments of `RetinaNet`; those of the focal loss have no effect.

    Raises:
        ValueError: The head does not give a score for each class and the background of each anchor.
    """

    def __init__(
        self,
        *,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        anchor_boundary_thresh: float = 0,
        **options,
    ) -> None:
        super().__init__(**options)
        anchors, channels = self.anchor_generator.num_anchors[0], self.head.objectness_logits.out_channels
        if channels != anchors * (self.num_classes + 1):
            raise ValueError(
                f"DkClassAwareRPN: head must give num_anchors * (num_classes + 1) = {anchors} * {self.num_classes + 1} "
                f"scores, got {channels}"
            )
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.anchor_boundary_thresh = anchor_boundary_thresh

    def forward_training(self, images: ImageList, features, predictions, gt_instances: list[Instances]) -> dict:
        """The losses `loss_cls` and `loss_box_reg`."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes + 1, 4])
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes)

    @torch.no_grad()
    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]) -> tuple[list[Tensor], list[Tensor]]:
        """`RetinaNet`'s labels [R] of each image's anchors, -1 where they are not sampled, and their boxes [R, 4]."""
        found, boxes = label_inside(super().label_anchors, anchors, gt_instances, self.anchor_boundary_thresh)
        sampled = []
        for labels in found:
            chosen = torch.cat(
                subsample_labels(labels, self.batch_size_per_image, self.positive_fraction, self.num_classes)
            )
            sampled.append(torch.full_like(labels, -1).scatter(0, chosen, labels[chosen]))
        return sampled, boxes

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes) -> dict[str, Tensor]:
        """Softmax cross-entropy and smooth L1, over the number of sampled anchors; arguments as of `RetinaNet`."""
        labels = torch.stack(gt_labels)  # [N, R]
        sampled = labels >= 0
        number = sampled.sum().clamp(min=1)
        boxes = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            sampled & (labels != self.num_classes),
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        classes = F.cross_entropy(cat(pred_logits, dim=1)[sampled], labels[sampled], reduction="sum")
        return {"loss_cls": classes / number, "loss_box_reg": boxes / number}

    def _decode_multi_level_predictions(self, *args) -> Instances:
        found = super()._decode_multi_level_predictions(*args)
        found.pred_boxes.clip(found.image_size)  # before non-maximum suppression, as an RPN does
        return found

    def forward_inference(self, images: ImageList, features, predictions) -> list[Instances]:
        """Detections of each image."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes + 1, 4])
        anchors = self.anchor_generator(features)
        return [
            self.inference_single_image(
                anchors, [each[i].softmax(-1)[:, :-1] for each in logits], [each[i] for each in deltas], size
            )
            for i, size in enumerate(images.image_sizes)
        ]
