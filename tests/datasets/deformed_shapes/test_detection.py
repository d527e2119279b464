"""Detection: COCO files, the geometry of layouts and annotations, pictures."""

import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import shapely
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from shapely.geometry import MultiPolygon, Point, Polygon, box

from dk_detection.datasets.deformed_shapes import CLASSES, outlines
from dk_detection.datasets.deformed_shapes.annotations import annotate
from dk_detection.datasets.deformed_shapes.detection import make, sample
from dk_detection.datasets.deformed_shapes.layout import OBJECT_SIZE, Layer, deform, layout
from dk_detection.datasets.deformed_shapes.painting import composite
from dk_detection.datasets.deformed_shapes.parameters import Difficulty

SMALL = dict(seed=3, num_train=12, num_val=6, num_test=3)
SIZE = 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "deformed_shapes"
    assert make(root, **SMALL)
    return root


@pytest.fixture(scope="module")
def layouts():
    difficulty = Difficulty.at(0.5)
    return [layout(np.random.default_rng([7, i]), difficulty, SIZE) for i in range(180)]


def objects(layers):
    return [layer for layer in layers if layer.category is not None]


def polygons(annotation):
    return [Polygon(np.reshape(points, (-1, 2))) for points in annotation["segmentation"]]


def decode(annotation, size=SIZE):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], size, size))).astype(bool)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


# The files.


def test_seed_split_and_index_give_other_pictures():
    keys = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "test", 0), (0, "train", 1)]
    assert len({sample(*key)[0].tobytes() for key in keys}) == len(keys)


@pytest.mark.parametrize(("split", "name"), [("train", "instances_train"), ("val", "instances_val")])
def test_coco_reads_the_annotations(root, split, name):
    coco = COCO(root / f"annotations/{name}.json")
    assert sorted(coco.imgs) == list(range(1, SMALL[f"num_{split}"] + 1))
    assert sorted(coco.anns) == list(range(1, len(coco.dataset["annotations"]) + 1))
    assert {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())} == dict(
        enumerate(CLASSES, start=1)
    )
    assert {file.name for file in (root / split).iterdir()} == {image["file_name"] for image in coco.imgs.values()}
    for image in coco.imgs.values():
        assert 1 <= len(coco.getAnnIds(imgIds=image["id"])) <= 6
        assert (image["height"], image["width"], 3) == cv2.imread(str(root / split / image["file_name"])).shape
    for annotation in coco.anns.values():
        assert annotation["iscrowd"] == 0
        assert coco.annToMask(annotation).sum() == pytest.approx(annotation["area"], rel=0.2)


def test_test_dev_has_image_info_only(root):
    content = json.loads((root / "annotations/image_info_test-dev.json").read_text())
    assert "annotations" not in content
    assert len(content["images"]) == SMALL["num_test"] == len(list((root / "test").iterdir()))
    assert len(content["categories"]) == len(CLASSES)
    COCO(root / "annotations/image_info_test-dev.json").loadRes(
        [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    )


def test_picture_and_annotations_belong_together(root):
    coco = COCO(root / "annotations/instances_val.json")
    for image in coco.imgs.values():
        pixels, layers = sample(SMALL["seed"], "val", image["id"] - 1)
        np.testing.assert_array_equal(cv2.imread(str(root / "val" / image["file_name"]))[..., ::-1], pixels)
        expected = annotate(layers)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            wanted = expected.pop(0)
            assert annotation == {"id": annotation["id"], "image_id": image["id"], **wanted}
        assert not expected


# The geometry.


def test_annotations_are_the_visible_regions(layouts):
    frame = box(0, 0, SIZE, SIZE)
    for layers in layouts:
        annotations = iter(annotate(layers))
        for i, layer in enumerate(layers):
            if layer.category is None:
                continue
            annotation = next(annotations)
            assert annotation["category_id"] == layer.category + 1
            parts = polygons(annotation)
            assert all(part.is_valid for part in parts)
            union = shapely.union_all(parts)
            expected = layer.outline.intersection(frame).difference(
                shapely.union_all([above.outline for above in layers[i + 1 :]])
            )
            # Up to the grid of 0.01 pixels along the outline, and slivers below half a pixel.
            assert union.symmetric_difference(expected).area < 0.01 * expected.length + 1.5
            assert union.area == pytest.approx(annotation["area"], abs=1e-3)
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == pytest.approx(union.bounds, abs=0.011)
            assert x >= 0
            assert y >= 0
            assert max(x + width, y + height) <= SIZE
        assert next(annotations, None) is None


def test_hole_is_cut_open():
    disc, square = Point(60, 50).buffer(9), box(30, 30, 90, 80)
    layers = [
        Layer(square, 2, MultiPolygon([square.difference(disc).difference(box(35, 40, 40, 45))])),
        Layer(disc, 0, MultiPolygon([disc])),
    ]
    below, above = annotate(layers)
    assert len(below["segmentation"]) > 1
    assert below["area"] == pytest.approx(60 * 50 - disc.area - 25, abs=0.2)
    mask = decode(below)
    assert not mask[42, 37]
    assert not mask[50, 60]
    assert not (mask & decode(above)).any()
    assert mask[30:80, 30:90].sum() == pytest.approx(60 * 50 - disc.area - 25, rel=0.03)
    assert mask[20:30].sum() == 0


def test_polygons_fit_the_picture(layouts):
    ious = []
    for layers in layouts[:60]:
        annotations = iter(annotate(layers))
        for i, layer in enumerate(layers):
            if layer.category is None:
                continue
            colours = [
                lambda height, width, value=j == i: np.full((height, width, 1), value) for j in range(len(layers))
            ]
            alpha = composite(np.zeros((SIZE, SIZE, 1)), [layer.outline for layer in layers], colours)[..., 0]
            annotation = next(annotations)
            assert alpha.sum() == pytest.approx(annotation["area"], rel=0.05)
            ious.append(iou(decode(annotation), alpha > 0.5))
    # One pixel along the outline of the smallest objects, of 14 x 14 pixels, is an IoU of 0.8.
    assert np.mean(ious) > 0.97
    assert np.min(ious) > 0.9


def test_visible_share_is_kept(layouts):
    for difficulty, scenes in (
        (0.5, layouts),
        (1, [layout(np.random.default_rng(i), Difficulty.at(1), SIZE) for i in range(60)]),
    ):
        least = Difficulty.at(difficulty).visible
        shares = np.array([layer.visible.area / layer.outline.area for layers in scenes for layer in objects(layers)])
        assert least >= 0.5
        assert shares.min() >= least
        assert (shares < 0.95).mean() > 0.2  # and a fair part of the objects is partly hidden
    assert sum(layer.category is None for layers in layouts for layer in layers) > 0.5 * len(layouts)


def test_every_category_has_all_sizes(layouts):
    low, high = SIZE * np.array(OBJECT_SIZE)
    assert high > 4 * low
    sizes = [[] for _ in CLASSES]
    for layers in layouts:
        assert 1 <= len(objects(layers)) <= 6
        for layer in objects(layers):
            sizes[layer.category].append(layer.outline.area**0.5)
    assert max(map(max, sizes)) > 4 * min(map(min, sizes))
    for category in sizes:
        assert max(category) > 3.5 * min(category)
        assert low * 0.98 < min(category)
        assert max(category) < high * 1.02


def test_categories_are_balanced(layouts):
    counts = np.bincount([layer.category for layers in layouts for layer in objects(layers)])
    assert len(counts) == len(CLASSES) >= 6
    np.testing.assert_allclose(counts, counts.mean(), atol=4 * counts.mean() ** 0.5)


@pytest.mark.parametrize("category", range(len(CLASSES)))
def test_outlines_bend_but_stay_simple(category):
    rng = np.random.default_rng(category)
    unit = outlines.category_outline(category)
    assert Polygon(unit).area == pytest.approx(1)
    deformed = [deform(rng, unit, 30, Difficulty.at(1)) for _ in range(50)]
    assert all(polygon.is_valid and not polygon.interiors for polygon in deformed)
    np.testing.assert_allclose([polygon.area**0.5 for polygon in deformed], 30, rtol=0.01)
    # No two have the same form: the ratio of perimeter to size, which rotation and scale leave alone, varies.
    assert np.std([polygon.length for polygon in deformed]) > 1


# The pictures.


class Relabelled(np.random.Generator):
    """The usual random numbers, but each object gets the category after its own."""

    def integers(self, *args, **kwargs):
        values = super().integers(*args, **kwargs)
        categories = args == (len(CLASSES),) and "size" in kwargs
        return (values + 1) % len(CLASSES) if categories else values


def test_categories_differ_in_outline_only(monkeypatch):
    # With one outline for all categories, the picture is the same whatever the categories of its objects.
    disc = outlines.category_outline(0)
    monkeypatch.setattr(outlines, "category_outline", lambda category: disc)
    usual = [sample(5, "train", i) for i in range(10)]
    monkeypatch.setattr(np.random, "default_rng", lambda key: Relabelled(np.random.PCG64(key)))
    for i, (image, layers) in enumerate(usual):
        relabelled_image, relabelled_layers = sample(5, "train", i)
        np.testing.assert_array_equal(relabelled_image, image)
        for layer, relabelled in zip(objects(layers), objects(relabelled_layers), strict=True):
            assert relabelled.category == (layer.category + 1) % len(CLASSES)
            assert relabelled.outline.equals(layer.outline)


def test_difficulty_moves_everything_one_way():
    values = np.array([list(asdict(Difficulty.at(difficulty)).values()) for difficulty in np.linspace(0, 1, 11)])
    steps = np.diff(values, axis=0)
    assert ((steps > 0).all(0) | (steps < 0).all(0)).all()


def test_difficulty_lowers_the_contrast():
    contrasts = []
    for difficulty in (0, 0.5, 1):
        distances = []
        for i in range(8):
            image, layers = sample(0, "train", i, difficulty=difficulty)
            for annotation in annotate(layers):
                mask = decode(annotation).astype(np.uint8)
                ring = cv2.dilate(mask, np.ones((9, 9))) & ~cv2.dilate(mask, np.ones((3, 3)))
                distances.append(np.linalg.norm(image[mask > 0].mean(0) - image[ring > 0].mean(0)))
        contrasts.append(np.median(distances))
    assert contrasts[0] > 1.5 * contrasts[1] > 2 * contrasts[2]


@pytest.mark.parametrize("size", [64, 97, 200])
def test_picture_follows_its_size(size):
    for i in range(4):
        image, layers = sample(0, "train", i, image_size=size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        for layer in objects(layers):
            assert 0.1 < layer.outline.area**0.5 / size < 0.5
