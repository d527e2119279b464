"""The data set for classification, in ImageNet's folders: one object an image, and a dial for each deformation."""

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from shapely.geometry import Polygon

from dk_detection.datasets.deformed_shapes import CLASSES, outlines
from dk_detection.datasets.deformed_shapes.files import Format, make_once, write_png
from dk_detection.datasets.deformed_shapes.painting import paint
from dk_detection.datasets.deformed_shapes.parameters import DEFAULT_DIFFICULTY, Difficulty, fraction, integer

SPLITS = ("train", "val")
MIN_IMAGE_SIZE = 32  # below, the smallest objects have fewer than 7 pixels across

OBJECT_SIZE = 0.33  # square root of the area of an object at scale 1, in image sizes
# What the dials reach at 1:
SCALE_RANGE = 2.2  # ratio of the largest size to the smallest
MAX_ROTATION = 180  # degrees
MAX_SHEAR = 0.6
MAX_WARP = 0.16  # object sizes


@dataclass(frozen=True)
class Deformation:
    """How strongly one object is deformed.

    Attributes:
        scale: Its size over `OBJECT_SIZE`.
        rotation: Degrees, clockwise, after the shear.
        shear: Displacement along one direction per distance across it; the direction is random.
        warp: Root mean square of the displacement that bends the outline, before the shear, in object sizes.
    """

    scale: float
    rotation: float
    shear: float
    warp: float

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, scale: float, rotation: float, shear: float, warp: float
    ) -> "Deformation":
        """Strengths between none and what the dials, each from 0 to 1, allow: log-uniform for the scale, else uniform.

        All dials draw the same numbers, so that turning one of them leaves the other strengths as they are.
        """
        draws = rng.uniform(-1, 1, 4).tolist()
        return cls(
            scale=SCALE_RANGE ** (scale * draws[0] / 2),
            rotation=rotation * MAX_ROTATION * draws[1],
            shear=shear * MAX_SHEAR * draws[2],
            warp=warp * MAX_WARP * abs(draws[3]),
        )


def deform(rng: np.random.Generator, outline: np.ndarray, deformation: Deformation, image_size: int) -> Polygon:
    """Bends, shears, rotates and scales an outline.

    Args:
        outline: Outline of unit area around the origin. [points, 2]
        image_size: Width and height of the image in pixels.

    Returns:
        A simple polygon around the origin, on the grid, not larger than the image.
    """
    turn = outlines.rotation(math.radians(deformation.rotation))
    while True:  # until the outline is not bent over itself and fits; nearly always the first does
        direction = rng.uniform(0, 2 * np.pi)
        along, across = outlines.rotation(direction).T
        shear = np.eye(2) + deformation.shear * np.outer(along, across)
        points = outlines.bend(rng, outline, deformation.warp) @ (turn @ shear).T
        polygon = outlines.finish(points, OBJECT_SIZE * image_size * deformation.scale)
        if polygon and np.ptp(np.reshape(polygon.bounds, (2, 2)), axis=0).max() <= image_size:
            return polygon


def sample(
    seed: int, split: str, index: int, *, difficulty: float, image_size: int, **dials: float
) -> tuple[np.ndarray, Polygon, Deformation]:
    """One picture of the data set, of the class `index % 6`. It depends on these arguments alone.

    Args:
        dials: `scale`, `rotation`, `shear` and `warp`, each from 0 to 1.

    Returns:
        The image [size, size, 3], RGB, uint8; the outline of its object; how that is deformed.
    """
    streams = np.random.SeedSequence([seed, SPLITS.index(split), index]).spawn(3)
    strengths, forms, surfaces = map(np.random.default_rng, streams)  # what one dial takes does not move the others
    deformation = Deformation.draw(strengths, **dials)
    polygon = deform(forms, outlines.category_outline(index % len(CLASSES)), deformation, image_size)
    x0, y0, x1, y1 = polygon.bounds
    centre = surfaces.uniform((-x0, -y0), (image_size - x1, image_size - y1))  # the object is wholly in sight
    polygon = outlines.move(polygon, centre)
    return paint(surfaces, [polygon], Difficulty.at(difficulty), image_size), polygon, deformation


def _images(split: str, parameters: dict) -> list[str]:
    """File names by index: the classes take turns, so that their numbers differ by one at most."""
    number = len(CLASSES)
    return [f"{CLASSES[index % number]}/{index // number + 1:06d}.png" for index in range(parameters[f"num_{split}"])]


def _files(parameters: dict) -> list[str]:
    images = [f"{split}/{name}" for split in SPLITS for name in _images(split, parameters)]
    return images + [f"meta/{split}.csv" for split in SPLITS]


def _write(root: Path, parameters: dict) -> Iterator[None]:
    settings = {key: value for key, value in parameters.items() if not key.startswith(("seed", "num_"))}
    for split in SPLITS:
        rows = []
        for index, name in enumerate(_images(split, parameters)):
            pixels, _, deformation = sample(parameters["seed"], split, index, **settings)
            write_png(root / split / name, pixels)
            strengths = {key: round(value, 4) + 0.0 for key, value in asdict(deformation).items()}  # no -0.0
            rows.append({"file": name, **strengths})
            yield
        with open(root / "meta" / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: row["file"]))  # the order in which folders are read


_FORMAT = Format("deformed_shapes_classification", 1, _files, _write)


def make(
    root: str | os.PathLike,
    *,
    seed: int = 0,
    scale: float = 1.0,
    rotation: float = 1.0,
    shear: float = 1.0,
    warp: float = 1.0,
    difficulty: float = DEFAULT_DIFFICULTY,
    image_size: int = 64,
    num_train: int = 6000,
    num_val: int = 1500,
) -> bool:
    """Makes the data set for classification, unless it is there already; see `make_once`.

    Writes `root/{train,val}/<class>/*.png`, `root/meta/{train,val}.csv` and the manifest. The tables hold each image's
    `Deformation`, in the order in which torchvision's ImageFolder and mmpretrain's CustomDataset read the images.

    Args:
        root: Folder of the data set; it is made if need be.
        seed: At least 0. The same arguments (and versions of NumPy, OpenCV and Shapely) give the same bytes.
        scale: From 0, all objects have one size, to 1, sizes differ by `SCALE_RANGE`.
        rotation: From 0, all objects are upright, to 1, any angle.
        shear: From 0 to 1, shears of up to `MAX_SHEAR` in any direction.
        warp: From 0 to 1, outlines are bent by up to `MAX_WARP`.
        difficulty: From 0 to 1; contrast, clutter and texture, as in `Difficulty`.
        image_size: Width and height in pixels, at least 32. All lengths in the picture follow it.
        num_train: Number of training images, at least 6; image k is the same whatever the number.
        num_val: Number of validation images, at least 6.

    Returns, Raises: As `detection.make`.
    """
    parameters = {
        "seed": integer("seed", seed, 0),
        "scale": fraction("scale", scale),
        "rotation": fraction("rotation", rotation),
        "shear": fraction("shear", shear),
        "warp": fraction("warp", warp),
        "difficulty": fraction("difficulty", difficulty),
        "image_size": integer("image_size", image_size, MIN_IMAGE_SIZE),
        "num_train": integer("num_train", num_train, len(CLASSES)),
        "num_val": integer("num_val", num_val, len(CLASSES)),
    }
    return make_once(root, _FORMAT, parameters)
