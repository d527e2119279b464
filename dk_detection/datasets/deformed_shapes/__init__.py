"""Deformed shapes: small data sets that are made in seconds from a seed, for detection, classification, segmentation.

Objects of all classes have the same sizes, colours and textures, and the background has that texture too: only the
outline tells what is an object and of which class. Outlines are bent, stretched, sheared and rotated.

    python -m dk_detection.datasets.deformed_shapes --out data/deformed_shapes
    python -m dk_detection.datasets.deformed_shapes --task classification --out data/deformed_shapes_classification
    python -m dk_detection.datasets.deformed_shapes --task segmentation --out data/deformed_shapes_segmentation

Pixel coordinates are COCO's: pixel (row i, column j) covers [j, j + 1] x [i, i + 1]; points are (x, y).
"""

from importlib import import_module

CLASSES = ("disc", "triangle", "square", "star", "cross", "crescent")

_LAZY = {"make": "detection", "make_classification": "classification", "make_segmentation": "segmentation"}


def __getattr__(name):
    """The functions that make the data sets load OpenCV and Shapely, which a look at `CLASSES` does not need."""
    if name in _LAZY:
        return import_module(f"{__name__}.{_LAZY[name]}").make
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
