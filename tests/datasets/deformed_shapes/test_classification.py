"""Classification: ImageNet's folders, and dials that change what they should and nothing else."""

import csv
import math
from dataclasses import asdict

import cv2
import numpy as np
import pytest
from shapely import affinity
from torchvision.datasets import ImageFolder

from dk_detection.datasets.deformed_shapes import CLASSES, outlines
from dk_detection.datasets.deformed_shapes.classification import (
    MAX_ROTATION,
    MAX_SHEAR,
    MAX_WARP,
    OBJECT_SIZE,
    SCALE_RANGE,
    Deformation,
    make,
    sample,
)

SIZE = 48
PARAMETERS = dict(difficulty=0.25, image_size=SIZE)
SMALL = dict(seed=3, num_train=14, num_val=9, image_size=SIZE)
OFF = dict(scale=0, rotation=0, shear=0, warp=0)
ON = dict(scale=1, rotation=1, shear=1, warp=1)
NONE = dict(scale=1, rotation=0, shear=0, warp=0)
# An outline is on a grid of 0.01 pixels, and leaves out corners of less than 0.03 pixels; once each for two outlines.
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "classification"
    assert make(root, **SMALL)
    return root


def table(root, split):
    with open(root / "meta" / f"{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def outline_of(index, **dials):
    """The outline of a picture's object, around the origin, and its deformation."""
    _, outline, deformation = sample(0, "train", index, **PARAMETERS, **(OFF | dials))
    return affinity.translate(outline, -outline.centroid.x, -outline.centroid.y), deformation


@pytest.mark.parametrize("split", ["train", "val"])
def test_torchvision_reads_it(root, split):
    data = ImageFolder(root / split)
    assert data.classes == sorted(CLASSES)
    counts = np.bincount(data.targets)
    assert counts.sum() == SMALL[f"num_{split}"]
    assert counts.max() - counts.min() <= 1
    assert all(image.size == (SIZE, SIZE) and image.mode == "RGB" for image, _ in data)
    # The table has the same order.
    assert [str(root / split / row["file"]) for row in table(root, split)] == [path for path, _ in data.samples]


def test_picture_and_table_belong_together(root):
    rows = {row.pop("file"): row for row in table(root, "val")}
    for index in range(SMALL["num_val"]):
        pixels, _, deformation = sample(SMALL["seed"], "val", index, **PARAMETERS, **ON)
        name = f"{CLASSES[index % 6]}/{index // 6 + 1:06d}.png"
        np.testing.assert_array_equal(cv2.imread(str(root / "val" / name))[..., ::-1], pixels)
        assert {key: float(value) for key, value in rows[name].items()} == pytest.approx(asdict(deformation), abs=1e-4)


def test_seed_split_and_index_give_other_pictures():
    keys = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 6)]
    assert len({sample(*key, **PARAMETERS, **OFF)[0].tobytes() for key in keys}) == len(keys)


# The dials.


@pytest.mark.parametrize("category", range(len(CLASSES)))
def test_all_dials_off(category):
    unit = outlines.category_outline(category) * OBJECT_SIZE * SIZE
    for index in (category, category + 6, category + 12):
        outline, deformation = outline_of(index)
        assert asdict(deformation) == NONE
        assert outline.hausdorff_distance(type(outline)(unit)) < TOLERANCE


def sheared(outline, shear):
    """The outline, sheared in the directions of a whole circle."""
    for angle in np.arange(0, 360, 0.5):
        turned = affinity.rotate(outline, -angle, origin=(0, 0))
        turned = affinity.affine_transform(turned, [1, shear, 0, 1, 0, 0])
        yield affinity.rotate(turned, angle, origin=(0, 0))


@pytest.mark.parametrize("index", [0, 7, 8, 15, 22, 23])  # each class once
def test_each_dial_alone(index):
    rest, _ = outline_of(index)

    outline, deformation = outline_of(index, scale=1)
    assert asdict(deformation) == NONE | dict(scale=deformation.scale)
    assert abs(math.log(deformation.scale)) > 0.01
    expected = affinity.scale(rest, deformation.scale, deformation.scale, origin=(0, 0))
    assert outline.hausdorff_distance(expected) < TOLERANCE * deformation.scale

    outline, deformation = outline_of(index, rotation=1)
    assert asdict(deformation) == NONE | dict(rotation=deformation.rotation)
    assert abs(deformation.rotation) > 1
    assert outline.hausdorff_distance(affinity.rotate(rest, deformation.rotation, origin=(0, 0))) < TOLERANCE

    outline, deformation = outline_of(index, shear=1)
    assert asdict(deformation) == NONE | dict(shear=deformation.shear)
    assert abs(deformation.shear) > 0.01
    distance = min(outline.hausdorff_distance(expected) for expected in sheared(rest, deformation.shear))
    assert distance < 2 * TOLERANCE  # half a degree more or less moves the tips by 0.1 pixels

    outline, deformation = outline_of(index, warp=1)
    assert asdict(deformation) == NONE | dict(warp=deformation.warp)
    assert outline.area == pytest.approx(rest.area, rel=0.01)
    moved = outline.hausdorff_distance(rest) / (OBJECT_SIZE * SIZE)
    assert 0.2 * deformation.warp < moved < 4 * deformation.warp


def test_warp_is_a_root_mean_square():
    rng, outline = np.random.default_rng(0), outlines.category_outline(3)
    moved = np.concatenate([outlines.bend(rng, outline, 0.1) - outline for _ in range(300)])
    assert (moved**2).sum(1).mean() ** 0.5 == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("dial", ON)
def test_a_dial_leaves_other_strengths_and_the_background(dial):
    for index in range(12):
        image, outline, everything = sample(0, "train", index, **PARAMETERS, **ON)
        other_image, other_outline, without = sample(0, "train", index, **PARAMETERS, **(ON | {dial: 0}))
        assert asdict(without) == asdict(everything) | {dial: NONE[dial]}
        inside = np.zeros((SIZE, SIZE), np.uint8)
        for polygon in (outline, other_outline):
            cv2.fillPoly(inside, [np.round(polygon.exterior.coords).astype(np.int32)], 1)
        background = cv2.dilate(inside, np.ones((5, 5))) == 0
        difference = (image.astype(float) - other_image)[background]
        assert difference.std() < 3.5  # the camera's noise, 2 in each image


def test_dials_say_how_far_strengths_go():
    def draw(value):
        draws = [Deformation.draw(np.random.default_rng(i), **dict.fromkeys(ON, value)) for i in range(500)]
        strengths = np.array([list(asdict(deformation).values()) for deformation in draws])
        strengths[:, 0] = np.log(strengths[:, 0])
        return strengths

    limits = np.array([math.log(SCALE_RANGE) / 2, MAX_ROTATION, MAX_SHEAR, MAX_WARP])
    full = draw(1.0) / limits
    assert np.abs(full).max() <= 1
    assert full[:, 3].min() >= 0
    for column in (full[:, 0], full[:, 1], full[:, 2], 2 * full[:, 3] - 1):  # uniform from -1 to 1
        counts = np.histogram(column, 5, (-1, 1))[0]
        assert counts.min() > 100 - 4 * 80**0.5
        assert counts.max() < 100 + 4 * 80**0.5
    np.testing.assert_allclose(draw(0.3), 0.3 * draw(1.0), rtol=1e-9)


@pytest.mark.parametrize("size", [32, 49, 100])
def test_objects_are_whole_simple_and_in_sight(size):
    for index in range(60):
        pixels, outline, deformation = sample(1, "val", index, difficulty=1, image_size=size, **ON)
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8
        assert outline.is_valid and not outline.interiors
        assert min(outline.bounds) > -0.011 and max(outline.bounds) < size + 0.011
        assert outline.area**0.5 == pytest.approx(OBJECT_SIZE * size * deformation.scale, rel=0.01)


# The classes.


def accuracy(features, labels):
    """Of a linear classifier on one half, trained on the other."""
    features = np.asarray(features, float)
    features = np.hstack([(features - features.mean(0)) / features.std(0), np.ones((len(features), 1))])
    half = len(features) // 2
    weights = np.linalg.lstsq(features[:half], np.eye(len(CLASSES))[labels[:half]], rcond=None)[0]
    return ((features[half:] @ weights).argmax(1) == labels[half:]).mean()


def test_only_the_outline_tells_the_class():
    colours, forms, labels = [], [], np.arange(600) % len(CLASSES)
    for index in range(labels.size):
        pixels, outline, _ = sample(2, "train", index, difficulty=0.25, image_size=32, **ON)
        inside = outline.representative_point()
        colour = pixels[int(inside.y), int(inside.x)] - pixels.mean((0, 1))
        colours.append([*pixels.mean((0, 1)), *pixels.std((0, 1)), *colour, np.linalg.norm(colour), outline.area])
        hull = outline.convex_hull
        forms.append([outline.length / outline.area**0.5, hull.area / outline.area, hull.length / outline.length])
    chance = 1 / len(CLASSES)
    assert accuracy(colours, labels) < chance + 3 * (chance * (1 - chance) / 300) ** 0.5
    assert accuracy(forms, labels) > 0.6
