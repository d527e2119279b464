"""The data set for detection and instance segmentation, in COCO format.

Objects are partly hidden by other objects, by unlabelled occluders and by the edge of the image.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dk_detection.datasets.deformed_shapes import CLASSES
from dk_detection.datasets.deformed_shapes.annotations import annotate
from dk_detection.datasets.deformed_shapes.files import Format, make_once, write_png
from dk_detection.datasets.deformed_shapes.layout import Layer, layout
from dk_detection.datasets.deformed_shapes.painting import paint
from dk_detection.datasets.deformed_shapes.parameters import DEFAULT_DIFFICULTY, Difficulty, fraction, integer

SPLITS = ("train", "val", "test")
MIN_IMAGE_SIZE = 64  # below, the smallest objects have fewer than 7 pixels across

_ANNOTATIONS = {
    "train": "annotations/instances_train.json",
    "val": "annotations/instances_val.json",
    "test": "annotations/image_info_test-dev.json",
}


def sample(
    seed: int, split: str, index: int, *, difficulty: float = DEFAULT_DIFFICULTY, image_size: int = 128
) -> tuple[np.ndarray, list[Layer]]:
    """One picture of the data set. It depends on these arguments alone, not on the other pictures.

    Returns:
        The image [size, size, 3], RGB, uint8, and its layers from the bottom to the top.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    levels = Difficulty.at(difficulty)
    layers = layout(rng, levels, image_size)
    return paint(rng, [layer.outline for layer in layers], levels, image_size), layers


def _files(parameters: dict) -> list[str]:
    images = [f"{split}/{i + 1:06d}.png" for split in SPLITS for i in range(parameters[f"num_{split}"])]
    return images + list(_ANNOTATIONS.values())


def _write(root: Path, parameters: dict) -> Iterator[None]:
    for split in SPLITS:
        yield from _write_split(root, split, parameters)


def _write_split(root: Path, split: str, parameters: dict) -> Iterator[None]:
    image_size = parameters["image_size"]
    images, annotations = [], []
    for index in range(parameters[f"num_{split}"]):
        pixels, layers = sample(
            parameters["seed"], split, index, difficulty=parameters["difficulty"], image_size=image_size
        )
        image = {"id": index + 1, "file_name": f"{index + 1:06d}.png", "width": image_size, "height": image_size}
        images.append(image)
        for annotation in annotate(layers):
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
        write_png(root / split / image["file_name"], pixels)
        yield
    content = {
        "info": {"description": f"deformed shapes, {split}", "version": str(_FORMAT.version), **parameters},
        "licenses": [],
        "images": images,
        "categories": [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)],
    }
    if split != "test":  # as COCO's test-dev: image info only
        content["annotations"] = annotations
    (root / _ANNOTATIONS[split]).write_text(json.dumps(content), encoding="utf-8")


_FORMAT = Format("deformed_shapes", 1, _files, _write)


def make(
    root: str | os.PathLike,
    *,
    seed: int = 0,
    difficulty: float = DEFAULT_DIFFICULTY,
    image_size: int = 128,
    num_train: int = 1500,
    num_val: int = 200,
    num_test: int = 100,
) -> bool:
    """Makes the data set for detection, unless it is there already; see `make_once`.

    Writes `root/{train,val,test}/*.png`, `root/annotations/instances_{train,val}.json`,
    `root/annotations/image_info_test-dev.json` and the manifest.

    Args:
        root: Folder of the data set; it is made if need be.
        seed: At least 0. The same arguments (and versions of NumPy, OpenCV and Shapely) give the same bytes.
        difficulty: From 0 to 1; what it changes is in `Difficulty`.
        image_size: Width and height in pixels, at least 64. All lengths in the picture follow it.
        num_train: Number of training images. Image k is the same whatever the number.
        num_val: Number of validation images.
        num_test: Number of test images; they have no annotations.

    Returns:
        True if the data set was made, False if it was there.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of its range.
        FileExistsError: `root` is a file, or a folder with other things in it.
    """
    parameters = {
        "seed": integer("seed", seed, 0),
        "difficulty": fraction("difficulty", difficulty),
        "image_size": integer("image_size", image_size, MIN_IMAGE_SIZE),
        "num_train": integer("num_train", num_train, 0),
        "num_val": integer("num_val", num_val, 0),
        "num_test": integer("num_test", num_test, 0),
    }
    return make_once(root, _FORMAT, parameters)
