"""Learned dynamics: what a layer's branches make of objects. Figure 3 of Deformable Kernels (2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dk_detection.errors import UserError
from dk_detection.visualization.paths import Call

_DYNAMICS = ("kernel_offset", "offset", "shares")  # the first that a layer has


def dynamics_of(call: Call) -> Tensor:
    """Kernel offsets, data offsets or shares of experts, [D, outH, outW], or [D] if one set serves the whole image.

    Raises:
        UserError: The layer has none of them.
    """
    values = next((call.sampling[name] for name in _DYNAMICS if name in call.sampling), None)
    if values is None:
        raise UserError(f"{call.name} has nothing that depends on the image")
    return values[0].detach()


def object_dynamics(values: Tensor, boxes: Tensor, shape: tuple[int, int]) -> Tensor:
    """One vector for each object: what a layer makes of the positions in its box, averaged.

    Args:
        values: [D, outH, outW], from `dynamics_of`.
        boxes: [n, 4] = (x1, y1, x2, y2), in pixels of what the network sees.
        shape: (height, width) of what the network sees.

    Returns:
        [n, D].
    """
    rows, columns = values.shape[1:]
    scale = boxes.new_tensor([columns / shape[1], rows / shape[0]]).repeat(2)
    vectors = [values.new_zeros(0, len(values))]
    for x1, y1, x2, y2 in (boxes * scale).tolist():
        left, top = min(int(x1), columns - 1), min(int(y1), rows - 1)
        right, bottom = max(round(x2), left + 1), max(round(y2), top + 1)
        vectors.append(values[None, :, top:bottom, left:right].mean((2, 3)))
    return torch.cat(vectors)


@dataclass(frozen=True)
class NeighbourFigures:
    """How well the nearest neighbour of an object predicts what the object is.

    Attributes:
        class_accuracy: Share of objects whose nearest neighbour is of their class.
        class_chance: The same for a neighbour drawn at random.
        decile_accuracy: Share of objects whose nearest neighbour is in their decile of size.
        decile_chance: The same for a neighbour drawn at random.
        decile_error: Mean number of deciles between an object and its nearest neighbour.
        decile_error_chance: The same for a neighbour drawn at random.
    """

    class_accuracy: float
    class_chance: float
    decile_accuracy: float
    decile_chance: float
    decile_error: float
    decile_error_chance: float


def size_deciles(areas: Tensor) -> Tensor:
    """The decile, 0 to 9, of each area's rank among all, as the paper colours its points."""
    ranks = areas.argsort(stable=True).argsort(stable=True)
    return ranks * 10 // max(len(areas), 1)


def nearest_neighbour_figures(vectors: Tensor, labels: Tensor, areas: Tensor) -> NeighbourFigures:
    """Predicts class and size of each object by those of its nearest neighbour among the others.

    Args:
        vectors: [n, D]; each dimension counts relative to its standard deviation.
        labels: [n], classes.
        areas: [n].

    Returns:
        The figures.

    Raises:
        UserError: There are fewer than two objects, or all vectors are equal.
    """
    distances = torch.cdist(*[_standardised(vectors)] * 2)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.argmin(1)
    deciles = size_deciles(areas)
    others = ~torch.eye(len(vectors), dtype=torch.bool)

    def chance(equal):
        return float(equal[others].double().mean())

    steps = (deciles[:, None] - deciles).abs()
    return NeighbourFigures(
        class_accuracy=float((labels == labels[nearest]).double().mean()),
        class_chance=chance(labels[:, None] == labels),
        decile_accuracy=float((deciles == deciles[nearest]).double().mean()),
        decile_chance=chance(steps == 0),
        decile_error=float((deciles - deciles[nearest]).abs().double().mean()),
        decile_error_chance=chance(steps),
    )


def embed(vectors: Tensor, seed: int = 0) -> Tensor:
    """The t-SNE of vectors [n, D] in the plane, [n, 2], by scikit-learn.

    Raises:
        UserError: scikit-learn is missing; there are fewer than two objects, or all vectors are equal.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError(
            f"t-SNE needs scikit-learn ({error}): pip install --no-build-isolation -e '.[visualization]'"
        ) from error
    standardised = _standardised(vectors)
    perplexity = min(30, (len(vectors) - 1) / 3)
    return torch.from_numpy(
        TSNE(perplexity=perplexity, init="pca" if vectors.shape[1] > 1 else "random", random_state=seed).fit_transform(
            standardised.numpy()
        )
    )


def _standardised(vectors: Tensor) -> Tensor:
    if len(vectors) < 2:
        raise UserError(f"learned dynamics need at least two objects, got {len(vectors)}")
    vectors = vectors.detach().cpu().double()
    deviation = vectors.std(0)
    moving = deviation > 1e-12
    if not moving.any():
        raise UserError("the layer's branch gives the same for every object: it has learned nothing")
    return (vectors[:, moving] - vectors[:, moving].mean(0)) / deviation[moving]
