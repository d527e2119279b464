"""Segmentation: the pictures are those of detection, and every pixel has the class of what it shows."""

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from shapely.geometry import MultiPolygon, box

from dk_detection.datasets.deformed_shapes import CLASSES, detection
from dk_detection.datasets.deformed_shapes.layout import Layer
from dk_detection.datasets.deformed_shapes.painting import composite
from dk_detection.datasets.deformed_shapes.segmentation import label_map, make

SMALL = dict(seed=3, num_train=5, num_val=4)
SIZE = 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "segmentation"
    assert make(root, **SMALL)
    return root


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_pictures_and_labels_are_those_of_the_detection_set(root, tmp_path):
    detection.make(tmp_path, **SMALL, num_test=0)
    for split in ("train", "val"):
        coco = COCO(tmp_path / f"annotations/instances_{split}.json")
        names = {image["file_name"] for image in coco.imgs.values()}
        assert {path.name for path in (root / split).iterdir()} == names
        assert {path.name for path in (root / "labels" / split).iterdir()} == names
        for image in coco.imgs.values():
            name = image["file_name"]
            assert (root / split / name).read_bytes() == (tmp_path / split / name).read_bytes()
            labels = read(root / "labels" / split / name)
            assert (labels.shape, labels.dtype) == ((SIZE, SIZE), np.uint8)
            expected = np.zeros_like(labels)
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
                expected[coco.annToMask(annotation) > 0] = annotation["category_id"]
            assert set(np.unique(labels)) == set(np.unique(expected))
            # pycocotools has other rules for the pixels on an outline.
            assert (labels != expected).mean() < 0.01


def test_a_pixel_has_the_class_of_what_is_painted_there():
    for index in range(20):
        _, layers = detection.sample(1, "train", index, difficulty=0.5)
        labels = label_map(layers, SIZE)
        classes = [0 if layer.category is None else layer.category + 1 for layer in layers]
        for number in range(1, len(CLASSES) + 1):
            colours = [lambda h, w, value=value == number: np.full((h, w, 1), float(value)) for value in classes]
            share = composite(np.zeros((SIZE, SIZE, 1)), [layer.outline for layer in layers], colours)[..., 0]
            assert (labels[share > 0.95] == number).all()
            assert (labels[share < 0.05] != number).all()


def test_the_top_layer_counts_and_occluders_are_background():
    def layer(outline, category):
        return Layer(outline, category, MultiPolygon([outline]))

    layers = [layer(box(2, 3, 30, 30), 2), layer(box(10, 10, 20, 14), None), layer(box(25.4, 5, 40, 8.6), 0)]
    labels = label_map(layers, 64)
    expected = np.zeros((64, 64), np.uint8)
    expected[3:30, 2:30] = 3
    expected[10:14, 10:20] = 0
    expected[5:9, 25:40] = 1  # the centres of column 25 and row 8 are inside
    np.testing.assert_array_equal(labels, expected)
