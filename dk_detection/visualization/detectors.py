"""What the pictures need of a detector, whichever framework it is of. Each adapter has one of these."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dk_detection.errors import UserError


@dataclass(frozen=True)
class Sample:
    """An image, and what the network sees of it.

    Attributes:
        image: [H, W, 3], RGB, uint8.
        input: [1, 3, h, w], resized, normalised and padded.
        size: (height, width) of the part of `input` that is image.
        scale: (x, y), pixels of `input` per pixel of `image`.
        data: What the framework predicts from.
    """

    image: np.ndarray
    input: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]
    data: Any = None

    def to_input(self, points: Tensor | Sequence) -> Tensor:
        """Points (x, y) or boxes (x1, y1, x2, y2) of the image in pixels of `input`."""
        points = torch.as_tensor(points, dtype=torch.float64)
        return points * points.new_tensor(self.scale).repeat(points.shape[-1] // 2)

    def to_image(self, points: Tensor) -> Tensor:
        """The way back."""
        return points / points.new_tensor(self.scale).repeat(points.shape[-1] // 2)


@dataclass(frozen=True)
class Objects:
    """Objects of an image, predicted or annotated.

    Attributes:
        boxes: [n, 4] = (x1, y1, x2, y2) in the image.
        labels: Their n classes.
        scores: [n], None if annotated.
        masks: [n, H, W], bool, None if there are none.
    """

    boxes: Tensor
    labels: list[str]
    scores: Tensor | None = None
    masks: Tensor | None = None

    def above(self, score: float) -> "Objects":
        """Those of at least a score."""
        chosen = (self.scores >= score).nonzero().flatten()
        return self[chosen]

    def __getitem__(self, index: Tensor) -> "Objects":
        return Objects(
            self.boxes[index],
            [self.labels[i] for i in index],
            None if self.scores is None else self.scores[index],
            None if self.masks is None else self.masks[index],
        )

    @property
    def areas(self) -> Tensor:
        return (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)

    def of_sizes(self, number: int) -> Tensor:
        """Indices of so many objects, or all if there are fewer, from the smallest to the largest."""
        order = self.areas.argsort()
        return order[torch.linspace(0, len(order) - 1, min(number, len(order))).round().long()]


class Detector(Protocol):
    """A detector in evaluation mode.

    Attributes:
        network: The detector.
        backbone: What the names of its backbone's modules start with.
        classes: Names of its classes; None: their numbers are their names.
    """

    network: nn.Module
    backbone: str
    classes: Sequence[str] | None

    def read(self, path: str) -> Sample:
        """Reads an image as the detector's test pipeline does.

        Raises:
            UserError: It cannot be read.
        """

    def of_input(self, image: Tensor) -> Sample:
        """An image [3, h, w], values 0 to 255, that is already as large as the network sees it."""

    def features(self, input: Tensor) -> Any:
        """Runs backbone and neck on an input [1, 3, h, w]."""

    def scores(self, input: Tensor, boxes: Tensor) -> Tensor:
        """What the box head says of boxes [n, 4] of the input, [n, classes + 1], before the softmax.

        Raises:
            UserError: The detector has no RoI head, or one that is not known.
        """

    def predict(self, sample: Sample) -> Objects:
        """What it detects."""


def read_coco(annotations: str, images: str) -> list[tuple[str, Objects]]:
    """The images of a COCO file that have objects, crowds left out.

    Args:
        annotations: The file.
        images: The folder of the images.

    Returns:
        Paths and objects.

    Raises:
        UserError: The file cannot be read, is none of COCO's, or has no objects.
    """
    try:
        with open(annotations, encoding="utf-8") as file:
            data = json.load(file)
        names = {category["id"]: category["name"] for category in data["categories"]}
        by_image: dict = {}
        for annotation in data["annotations"]:
            if not annotation.get("iscrowd"):
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        found = []
        for image in data["images"]:
            objects = by_image.get(image["id"], [])
            boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float64).view(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = [names[each["category_id"]] for each in objects]
            if objects:
                found.append((os.path.join(images, image["file_name"]), Objects(boxes, labels)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations}: no COCO annotations can be read ({type(error).__name__}: {error})") from error
    if not found:
        raise UserError(f"{annotations}: there are no objects")
    return found
