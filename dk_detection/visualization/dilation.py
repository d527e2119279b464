"""Effective dilation: Table 2 of Deformable Convolutional Networks (2017)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dk_detection.visualization.paths import Observation, Step

CLASSES = ("small", "medium", "large", "background")
COCO_AREAS = (32.0**2, 96.0**2)


def effective_dilation(step: Step) -> Tensor:
    """The mean distance of neighbouring sampling locations of a layer at each output position.

    Neighbours are taps that lie beside or below one another in the kernel at rest.

    Args:
        step: A layer with more than one tap, from `Observation.path`.

    Returns:
        [G, outH, outW], in pixels of the layer's input; G are the offset groups. A resting layer has its dilation
        everywhere.
    """
    taps = step.rest().to(step.call.sampling["offset"].device)
    offset = step.call.sampling["offset"][0].detach().double()
    kernel_h, kernel_w = step.kernel_size
    fields = offset.unflatten(0, (-1, kernel_h, kernel_w, 2))  # [G, kH, kW, 2, outH, outW]
    places = fields + taps.view(kernel_h, kernel_w, 2, 1, 1)
    distances = [(places.diff(dim=dim)).norm(dim=3).flatten(1, 2) for dim in (1, 2)]
    return torch.cat(distances, 1).mean(1)


def classify_positions(centers: Tensor, boxes: Tensor, areas: tuple[float, float]) -> Tensor:
    """To which object each position belongs, by its size.

    Args:
        centers: [..., 2] = (x, y).
        boxes: [n, 4] = (x1, y1, x2, y2). In several boxes, a position belongs to the smallest.
        areas: Areas that part small from medium and medium from large.

    Returns:
        [...], an index of `CLASSES`.
    """
    background = torch.full(centers.shape[:-1], CLASSES.index("background"), device=centers.device)
    if not len(boxes):
        return background
    size = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    inside = ((centers[..., None, :] >= boxes[:, :2]) & (centers[..., None, :] < boxes[:, 2:])).all(-1)  # [..., n]
    smallest = torch.where(inside, size, torch.inf).amin(-1)
    sizes = torch.bucketize(smallest, size.new_tensor(areas))
    return torch.where(smallest.isinf(), background, sizes)


def thirds(areas: Sequence[float]) -> tuple[float, float]:
    """The two areas that part objects into three equally large classes."""
    one, two = torch.tensor(areas, dtype=torch.float64).quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    return float(one), float(two)


@dataclass
class DilationTable:
    """Gathers effective dilations over images.

    Args:
        areas: Areas that part small from medium and medium from large, in pixels of the image.
    """

    areas: tuple[float, float] = COCO_AREAS
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seen: Observation, boxes: Tensor, size: tuple[int, int] | None = None, scale=(1.0, 1.0)) -> None:
        """Adds the filters of one image, of all deformable layers on the way from the observed layer to the image.

        Args:
            seen: What `observe` saw.
            boxes: [n, 4] = (x1, y1, x2, y2) of the objects in the image.
            size: (height, width) of the part of the network's input that is image and not padding; None: all of it.
            scale: (x, y), pixels of the network's input per pixel of the image.
        """
        height, width = size or seen.image.shape[2:]
        for i, step in enumerate(seen.path):
            if not step.is_deformable or step.num_taps < 2:
                continue
            values = effective_dilation(step)
            centers = _centers(seen.path[i:], values.shape[1:])
            on_image = (centers >= 0).all(-1) & (centers[..., 0] < width) & (centers[..., 1] < height)
            classes = classify_positions(centers / centers.new_tensor(scale), boxes.double().cpu(), self.areas)
            sums = self._sums.setdefault(step.name, torch.zeros(len(CLASSES), 3, dtype=torch.float64))
            for number in range(len(CLASSES)):
                chosen = values.cpu()[:, on_image & (classes == number)]
                sums[number] += torch.stack([torch.tensor(chosen.numel()), chosen.sum(), chosen.square().sum()])

    def rows(self) -> dict[str, dict[str, dict[str, float]]]:
        """By layer and class {"mean", "std", "count"}; what was seen nowhere is left out."""
        table = {}
        for layer, sums in self._sums.items():
            table[layer] = {}
            for name, (count, total, squares) in zip(CLASSES, sums.tolist(), strict=True):
                if count:
                    deviation = max(squares / count - (total / count) ** 2, 0) ** 0.5
                    table[layer][name] = {"mean": total / count, "std": deviation, "count": int(count)}
        return table


def _centers(path: list[Step], shape) -> Tensor:
    """(x, y) in the image of the middle of what each position of a layer's output sees at rest, [outH, outW, 2]."""
    along = [torch.arange(length, dtype=torch.float64) for length in shape]
    positions = torch.stack(torch.meshgrid(*along, indexing="ij"), -1)
    for step in path:
        positions = positions * torch.tensor(step.stride) + step.rest().mean(0)
    return positions.flip(-1) + 0.5
