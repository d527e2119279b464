"""Layout of a picture of several things: which outline lies where, and what of it can be seen."""

from dataclasses import dataclass, replace

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon, box

from dk_detection.datasets.deformed_shapes import CLASSES, outlines
from dk_detection.datasets.deformed_shapes.outlines import GRID
from dk_detection.datasets.deformed_shapes.parameters import Difficulty

OBJECTS = (1, 6)  # per image
OBJECT_SIZE = (0.11, 0.47)  # square root of the area of a whole object, in image sizes
OCCLUDER_SIZE = (0.08, 0.2)


@dataclass(frozen=True)
class Layer:
    """One thing on top of the background.

    Attributes:
        outline: The whole outline, also where it is hidden or outside of the image.
        category: Index into CLASSES; None is an occluder.
        visible: What can be seen of it below the layers above, inside of the image.
    """

    outline: Polygon
    category: int | None
    visible: MultiPolygon

    @property
    def visible_share(self) -> float:
        return self.visible.area / self.outline.area

    def below(self, outline: Polygon) -> "Layer":
        """This layer when something with that outline lies over it."""
        if not self.visible.intersects(outline):
            return self
        return replace(self, visible=area_of(shapely.difference(self.visible, outline, grid_size=GRID)))


def area_of(geometry) -> MultiPolygon:
    """A geometry without points and lines: where outlines touch, their intersection and difference can have such."""
    return MultiPolygon([part for part in shapely.get_parts(geometry) if part.geom_type == "Polygon"])


def layout(rng: np.random.Generator, difficulty: Difficulty, image_size: int) -> list[Layer]:
    """Layers from the bottom to the top. Each object among them keeps its share `difficulty.visible` in sight."""

    def in_sight(layer: Layer) -> bool:
        return layer.visible_share >= (0.01 if layer.category is None else difficulty.visible)

    categories = rng.integers(len(CLASSES), size=rng.integers(OBJECTS[0], OBJECTS[1] + 1)).tolist()
    categories += [None] * rng.poisson(difficulty.occluders)
    frame = box(0, 0, image_size, image_size)
    layers = []
    for category in rng.permutation(np.array(categories, dtype=object)):
        low, high = OCCLUDER_SIZE if category is None else OBJECT_SIZE
        size = image_size * low * (high / low) ** rng.random()  # log-uniform, the same for all categories
        unit = outlines.occluder_outline(rng) if category is None else outlines.category_outline(category)
        shape = deform(rng, unit, size, difficulty)
        for _ in range(50):  # places to try; where all are taken the layer is left out
            centre = rng.uniform(0, image_size, 2)
            if category is None and layers:  # an occluder lies near something that it can hide
                target = layers[rng.integers(len(layers))].outline
                centre = np.array(target.centroid.coords[0]) + rng.normal(0, 0.5 * target.area**0.5, 2)
            outline = outlines.move(shape, centre)
            new = Layer(outline, category, area_of(shapely.intersection(outline, frame, grid_size=GRID)))
            if not in_sight(new):
                continue
            below = [layer.below(outline) for layer in layers]
            if all(map(in_sight, below)):
                layers = [*below, new]
                break
    return layers


def deform(rng: np.random.Generator, outline: np.ndarray, size: float, difficulty: Difficulty) -> Polygon:
    """Bends, stretches, shears, rotates and scales an outline, as strongly as the difficulty says.

    Args:
        outline: Outline of unit area around the origin. [points, 2]
        size: Square root of the area of the result, in pixels.

    Returns:
        A simple polygon around the origin, on the grid.
    """
    while True:  # until the outline is not bent over itself; nearly always the first is not
        points = outlines.bend(rng, outline, difficulty.warp)
        first, last = rng.uniform(0, 2 * np.pi, 2)
        stretch = difficulty.stretch ** rng.uniform(-0.5, 0.5)
        shear = np.array([[stretch, rng.uniform(-1, 1) * difficulty.shear], [0, 1 / stretch]])
        points = points @ (outlines.rotation(last) @ shear @ outlines.rotation(first)).T
        if polygon := outlines.finish(points, size):
            return polygon
