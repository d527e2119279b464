"""The data set for semantic segmentation: the pictures of the detection set, and for each the class of every pixel."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import shapely

from dk_detection.datasets.deformed_shapes.detection import MIN_IMAGE_SIZE, sample
from dk_detection.datasets.deformed_shapes.files import Format, make_once, write_png
from dk_detection.datasets.deformed_shapes.layout import Layer
from dk_detection.datasets.deformed_shapes.parameters import DEFAULT_DIFFICULTY, fraction, integer

SPLITS = ("train", "val")


def label_map(layers: list[Layer], image_size: int) -> np.ndarray:
    """What the centre of each pixel shows.

    Args:
        layers: From the bottom to the top, as `detection.sample` returns them.
        image_size: Width and height in pixels.

    Returns:
        0 for the background and for occluders, i + 1 for an object of class i. [size, size], uint8
    """
    labels = np.zeros((image_size, image_size), np.uint8)
    centres = np.arange(image_size) + 0.5
    x, y = np.meshgrid(centres, centres)
    for layer in layers:
        shapely.prepare(layer.outline)
        labels[shapely.contains_xy(layer.outline, x, y)] = 0 if layer.category is None else layer.category + 1
    return labels


def _names(split: str, parameters: dict) -> list[str]:
    return [f"{i + 1:06d}.png" for i in range(parameters[f"num_{split}"])]


def _files(parameters: dict) -> list[str]:
    return [
        f"{folder}/{name}"
        for split in SPLITS
        for folder in (split, f"labels/{split}")
        for name in _names(split, parameters)
    ]


def _write(root: Path, parameters: dict) -> Iterator[None]:
    seed, difficulty, image_size = (parameters[name] for name in ("seed", "difficulty", "image_size"))
    for split in SPLITS:
        for index, name in enumerate(_names(split, parameters)):
            pixels, layers = sample(seed, split, index, difficulty=difficulty, image_size=image_size)
            write_png(root / split / name, pixels)
            write_png(root / "labels" / split / name, label_map(layers, image_size))
            yield


_FORMAT = Format("deformed_shapes_segmentation", 1, _files, _write)


def make(
    root: str | os.PathLike,
    *,
    seed: int = 0,
    difficulty: float = DEFAULT_DIFFICULTY,
    image_size: int = 128,
    num_train: int = 1500,
    num_val: int = 200,
) -> bool:
    """Makes the data set for semantic segmentation, unless it is there already; see `make_once`.

    Writes `root/{train,val}/*.png`, which are the pictures of the detection set with the same arguments, their label
    maps `root/labels/{train,val}/*.png`, grey with a class number a pixel (see `label_map`), and the manifest.

    Args:
        root: Folder of the data set; it is made if need be.
        seed, difficulty, image_size: As in `detection.make`.
        num_train: Number of training images, at least 1. Image k is the same whatever the number.
        num_val: Number of validation images, at least 1.

    Returns, Raises: As `detection.make`.
    """
    parameters = {
        "seed": integer("seed", seed, 0),
        "difficulty": fraction("difficulty", difficulty),
        "image_size": integer("image_size", image_size, MIN_IMAGE_SIZE),
        "num_train": integer("num_train", num_train, 1),
        "num_val": integer("num_val", num_val, 1),
    }
    return make_once(root, _FORMAT, parameters)
