"""Deformed shapes: a small COCO-format detection and segmentation data set, made in seconds from a seed.

Objects of all categories have the same sizes, colours and textures, and the background has that texture too: only the
outline tells what is an object and of which category. Outlines are bent, stretched, sheared and rotated, and partly
hidden by other objects, by unlabelled occluders and by the edge of the image. Annotations are the visible regions, as
polygons that are computed, not traced.

    python -m dk_detection.datasets.deformed_shapes --out data/deformed_shapes

Pixel coordinates are COCO's: pixel (row i, column j) covers [j, j + 1] x [i, i + 1]; points are (x, y).
"""

import argparse
import json
import math
import numbers
import operator
import os
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import shapely
from shapely import affinity
from shapely.geometry import MultiPolygon, Point, Polygon, box
from tqdm import tqdm

CLASSES = ("disc", "triangle", "square", "star", "cross", "crescent")
SPLITS = ("train", "val", "test")

DEFAULT_DIFFICULTY = 0.25  # a small detector learns it within minutes and is far from perfect
MIN_IMAGE_SIZE = 64  # below, the smallest objects have fewer than 7 pixels across
OBJECTS = (1, 6)  # per image
OBJECT_SIZE = (0.11, 0.47)  # square root of the area of a whole object, in image sizes
OCCLUDER_SIZE = (0.08, 0.2)

_FORMAT = {"name": "deformed_shapes", "version": 1}  # raise the version when the same parameters give other files
_MANIFEST = "dataset.json"
_ANNOTATIONS = {
    "train": "annotations/instances_train.json",
    "val": "annotations/instances_val.json",
    "test": "annotations/image_info_test-dev.json",
}
_GRID = 0.01  # pixels; all outlines lie on this grid, so that rounding an annotation changes nothing
_SUPERSAMPLING = 8


# Difficulty: all that it changes.


@dataclass(frozen=True)
class Dials:
    """What makes a picture easy or hard. Colours are in grey levels of 0 to 255, lengths in object sizes."""

    contrast: float  # distance in colour space between the mean of an object and that of the background
    clutter_contrast: float  # the same for the strokes and spots on all surfaces
    clutter: float  # mean number of strokes and spots on a surface as large as the image
    texture: float  # standard deviation of the texture
    occluders: float  # mean number of unlabelled occluders
    visible: float  # share of an object that stays visible at least
    stretch: float  # largest ratio of the stretch along one axis to that along the other
    shear: float  # largest shear
    warp: float  # root mean square of the displacement that bends an outline

    @classmethod
    def at(cls, difficulty: float) -> "Dials":
        """The dials at a difficulty in [0, 1]: each moves geometrically, so smoothly and in one direction.

        Raises:
            TypeError: The difficulty is not a number.
            ValueError: The difficulty is not in [0, 1].
        """
        if not isinstance(difficulty, numbers.Real):
            raise TypeError(f"deformed_shapes: difficulty is {difficulty!r}, expected a number from 0 to 1")
        if not 0 <= difficulty <= 1:
            raise ValueError(f"deformed_shapes: difficulty is {difficulty}, expected a number from 0 to 1")
        ends = {
            "contrast": (110, 14),
            "clutter_contrast": (28, 14),  # at difficulty 1 that of the objects
            "clutter": (10, 40),
            "texture": (6, 20),
            "occluders": (0.4, 2.5),
            "visible": (0.9, 0.5),
            "stretch": (1.1, 1.7),
            "shear": (0.1, 0.5),
            "warp": (0.03, 0.12),
        }
        return cls(**{name: easy ** (1 - difficulty) * hard**difficulty for name, (easy, hard) in ends.items()})


# Outlines: polygons of unit area around the origin, then deformed.


def _unit(polygon: Polygon) -> np.ndarray:
    """Densely sampled outline, moved to its centroid and scaled to unit area. [points, 2]"""
    polygon = affinity.translate(polygon, -polygon.centroid.x, -polygon.centroid.y)
    polygon = affinity.scale(polygon, *[polygon.area**-0.5] * 2, origin=(0, 0))
    return shapely.get_coordinates(polygon.segmentize(0.05))[:-1]


def _circular(radii) -> Polygon:
    """The polygon with these radii at equal angles; the first points up."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return Polygon(np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.asarray(radii)[:, None])


@cache
def _outline(category: int) -> np.ndarray:
    polygon = {
        "disc": _circular([1] * 64),
        "triangle": _circular([1] * 3),
        "square": box(-1, -1, 1, 1),
        "star": _circular([1, 0.42] * 5),
        "cross": box(-3, -1, 3, 1).union(box(-1, -3, 1, 3)),
        "crescent": Point(0, 0).buffer(1, 32).difference(Point(0.55, 0).buffer(0.8, 32)),
    }[CLASSES[category]]
    return _unit(polygon)


def _occluder_outline(rng: np.random.Generator) -> np.ndarray:
    """A bar or a lobed blob. [points, 2]"""
    if rng.random() < 0.6:
        return _unit(box(0, 0, rng.uniform(5, 10), 1))
    angles = np.arange(96) * 2 * np.pi / 96
    waves = [rng.uniform(0.2, 0.35) * np.sin(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3)]
    return _unit(_circular(1 + sum(waves)))


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _deform(rng: np.random.Generator, outline: np.ndarray, size: float, dials: Dials) -> Polygon:
    """Bends, stretches, shears, rotates and scales an outline.

    Args:
        outline: Outline of unit area around the origin. [points, 2]
        size: Square root of the area of the result, in pixels.

    Returns:
        A simple polygon around the origin, on the grid.
    """
    while True:  # until the outline is not bent over itself; nearly always the first is not
        # A smooth displacement field: three plane waves, 1.5 to 4 object sizes long.
        heading = rng.uniform(0, 2 * np.pi, (2, 3))
        frequency = rng.uniform(1 / 4, 1 / 1.5, 3) * np.stack([np.cos(heading[0]), np.sin(heading[0])])  # [2, waves]
        amplitude = dials.warp * (2 / 3) ** 0.5 * np.stack([np.cos(heading[1]), np.sin(heading[1])])  # [2, waves]
        phase = 2 * np.pi * (outline @ frequency + rng.random(3))  # [points, waves]
        points = outline + np.sin(phase) @ amplitude.T  # [points, 2]

        first, last = rng.uniform(0, 2 * np.pi, 2)
        stretch = dials.stretch ** rng.uniform(-0.5, 0.5)
        shear = np.array([[stretch, rng.uniform(-1, 1) * dials.shear], [0, 1 / stretch]])
        points = points @ (_rotation(last) @ shear @ _rotation(first)).T
        polygon = Polygon(points)
        if polygon.is_valid:
            polygon = Polygon((points - polygon.centroid.coords[0]) * size / polygon.area**0.5)
            polygon = shapely.set_precision(polygon.simplify(0.03), _GRID)
            if polygon.geom_type == "Polygon" and not polygon.interiors:
                return polygon


def _area(geometry) -> MultiPolygon:
    """A geometry without points and lines: where outlines touch, their intersection and difference can have such."""
    return MultiPolygon([part for part in shapely.get_parts(geometry) if part.geom_type == "Polygon"])


# Layout: which outline lies where, and what of it can be seen.


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
        return replace(self, visible=_area(shapely.difference(self.visible, outline, grid_size=_GRID)))


def layout(rng: np.random.Generator, dials: Dials, image_size: int) -> list[Layer]:
    """Layers from the bottom to the top. Each object among them keeps its share `dials.visible` in sight."""

    def in_sight(layer: Layer) -> bool:
        return layer.visible_share >= (0.01 if layer.category is None else dials.visible)

    categories = rng.integers(len(CLASSES), size=rng.integers(OBJECTS[0], OBJECTS[1] + 1)).tolist()
    categories += [None] * rng.poisson(dials.occluders)
    frame = box(0, 0, image_size, image_size)
    layers = []
    for category in rng.permutation(np.array(categories, dtype=object)):
        low, high = OCCLUDER_SIZE if category is None else OBJECT_SIZE
        size = image_size * low * (high / low) ** rng.random()  # log-uniform, the same for all categories
        shape = _deform(rng, _occluder_outline(rng) if category is None else _outline(category), size, dials)
        for _ in range(50):  # places to try; where all are taken the layer is left out
            centre = rng.uniform(0, image_size, 2)
            if category is None and layers:  # an occluder lies near something that it can hide
                target = layers[rng.integers(len(layers))].outline
                centre = np.array(target.centroid.coords[0]) + rng.normal(0, 0.5 * target.area**0.5, 2)
            outline = affinity.translate(shape, *np.round(centre / _GRID) * _GRID)
            new = Layer(outline, category, _area(shapely.intersection(outline, frame, grid_size=_GRID)))
            if not in_sight(new):
                continue
            below = [layer.below(outline) for layer in layers]
            if all(map(in_sight, below)):
                layers = [*below, new]
                break
    return layers


# Pictures.


def _coverage(outline: Polygon, image_size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of the image that an outline touches, and which share of each of its pixels the outline covers."""
    x0, y0, x1, y1 = np.clip(outline.bounds, 0, image_size)
    x0, y0, x1, y1 = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    fine = np.zeros(((y1 - y0) * _SUPERSAMPLING, (x1 - x0) * _SUPERSAMPLING), np.uint8)
    fraction_bits = 8
    # OpenCV counts from the centre of the first pixel, COCO from its corner.
    points = (shapely.get_coordinates(outline) - (x0, y0)) * _SUPERSAMPLING - 0.5
    cv2.fillPoly(fine, [np.round(points * 2**fraction_bits).astype(np.int32)], 255, shift=fraction_bits)
    coverage = cv2.resize(fine.astype(np.float32), (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA) / 255
    return np.s_[y0:y1, x0:x1], coverage


def composite(image: np.ndarray, layers: list[Layer], surfaces) -> np.ndarray:
    """Lays surfaces, cut out along the layers' outlines, over an image.

    Args:
        image: What lies below. [size, size, 3], float
        surfaces: For each layer a function of (height, width) that gives its colours. [height, width, 3]
    """
    image = image.copy()
    for layer, surface in zip(layers, surfaces, strict=True):
        window, coverage = _coverage(layer.outline, len(image))
        image[window] += coverage[..., None] * (surface(*coverage.shape) - image[window])
    return image


class _Palette:
    """The colours and the texture of one image; background, objects, occluders and clutter share them."""

    def __init__(self, rng: np.random.Generator, dials: Dials, image_size: int):
        self.rng, self.dials, self.image_size = rng, dials, image_size
        self.base = rng.uniform(80, 175, 3)
        mixing = rng.normal(0, 0.6, (3, 3)) + [1, 0, 0]  # channels vary mostly together
        self.mixing = mixing / np.linalg.norm(mixing, axis=1, keepdims=True)
        weights = rng.uniform(0.5, 1) ** np.arange(4)
        self.octaves = [(image_size // 2**i, weight) for i, weight in enumerate(weights / np.linalg.norm(weights), 2)]

    def shift(self, contrast: float) -> np.ndarray:
        """A random colour difference of this length, about. [3]"""
        shift = self.rng.normal(size=3)
        shift *= contrast * self.rng.uniform(0.8, 1.2) / np.linalg.norm(shift)
        colour = self.base + shift
        return np.where((colour > 5) & (colour < 250), shift, -shift)  # towards the other side where there is no room

    def surface(self, height: int, width: int, shift=0) -> np.ndarray:
        """Textured and cluttered area whose mean colour differs by `shift` from the background's. [height, width, 3]"""
        texture = np.zeros((height, width, 3), np.float32)
        for wavelength, weight in self.octaves:
            rows, columns = math.ceil(height / wavelength) + 1, math.ceil(width / wavelength) + 1
            noise = self.rng.standard_normal((rows, columns, 3), np.float32)
            noise = cv2.resize(noise, None, fx=wavelength, fy=wavelength, interpolation=cv2.INTER_CUBIC)
            y, x = self.rng.integers(wavelength, size=2)
            texture += weight * noise[y : y + height, x : x + width]
        return self.base + shift + self.dials.texture * texture @ self.mixing.T + self._clutter(height, width)

    def _clutter(self, height: int, width: int) -> np.ndarray:
        """Strokes and spots, as differences from the surface that they are on. [height, width, 3]"""
        rng, unit = self.rng, self.image_size / 128
        canvas = np.full((height, width, 3), 128, np.uint8)  # OpenCV draws smooth edges on 8 bits only
        for _ in range(rng.poisson(self.dials.clutter * height * width / self.image_size**2)):
            colour = tuple(128 + self.shift(self.dials.clutter_contrast))
            start = rng.uniform(0, (width, height))
            if rng.random() < 0.5:
                heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.4, 8))
                steps = rng.uniform(1, 5) * unit * np.stack([np.cos(heading), np.sin(heading)], axis=1)
                points = np.round((start + np.cumsum(steps, axis=0)) * 16).astype(np.int32)
                thickness = max(1, round(rng.uniform(1, 3) * unit))
                cv2.polylines(canvas, [points], False, colour, thickness, cv2.LINE_AA, shift=4)
            else:
                axes = rng.uniform(1, 4, 2) * unit
                centre, axes = (tuple(int(v) for v in np.round(a * 16)) for a in (start, axes))
                cv2.ellipse(canvas, centre, axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA, shift=4)
        return canvas.astype(np.float32) - 128


def sample(
    seed: int, split: str, index: int, *, difficulty: float = DEFAULT_DIFFICULTY, image_size: int = 128
) -> tuple[np.ndarray, list[Layer]]:
    """One picture of the data set. It depends on these arguments alone, not on the other pictures.

    Returns:
        The image [size, size, 3], RGB, uint8, and its layers from the bottom to the top.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    dials = Dials.at(difficulty)
    layers = layout(rng, dials, image_size)
    palette = _Palette(rng, dials, image_size)
    surfaces = [partial(palette.surface, shift=palette.shift(dials.contrast)) for _ in layers]
    image = composite(palette.surface(image_size, image_size), layers, surfaces)
    image += 2 * rng.standard_normal(image.shape, np.float32)  # the camera's noise
    return np.clip(np.round(image), 0, 255).astype(np.uint8), layers


# Annotations and files.


def _segmentation(visible: MultiPolygon) -> list[list[float]]:
    """COCO polygons [x0, y0, x1, y1, ...] of a region. They cannot have holes, so that a cut goes through each hole."""
    polygons, todo = [], list(visible.geoms)
    while todo:
        polygon = todo.pop(0)
        if polygon.interiors:
            x0, y0, x1, y1 = polygon.bounds
            hole = polygon.interiors[0].bounds
            cut = (hole[0] + hole[2]) / 2
            for half in (box(x0, y0, cut, y1), box(cut, y0, x1, y1)):
                todo += _area(polygon.intersection(half)).geoms
        elif polygon.area >= 0.5:  # slivers below half a pixel cannot be seen
            polygons.append(np.round(shapely.get_coordinates(polygon)[:-1], 2).ravel().tolist())
    return polygons


def annotate(layers: list[Layer]) -> list[dict]:
    """COCO annotations of the objects among the layers, without the ids of image and annotation."""
    annotations = []
    for layer in layers:
        if layer.category is None:
            continue
        segmentation = _segmentation(layer.visible)
        region = MultiPolygon([Polygon(np.reshape(polygon, (-1, 2))) for polygon in segmentation])
        x0, y0, x1, y1 = region.bounds
        annotations.append(
            {
                "category_id": layer.category + 1,
                "segmentation": segmentation,
                "area": round(region.area, 4),
                "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                "iscrowd": 0,
            }
        )
    return annotations


def _files(parameters: dict) -> list[str]:
    """All files of a data set but its manifest, relative to its folder."""
    images = [f"{split}/{i + 1:06d}.png" for split in SPLITS for i in range(parameters[f"num_{split}"])]
    return images + list(_ANNOTATIONS.values())


def _write_manifest(root: Path, parameters: dict, complete: bool) -> None:
    manifest = {"format": _FORMAT, "complete": complete, "parameters": parameters}
    temporary = root / f"{_MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, root / _MANIFEST)  # at no time is there half a manifest


def _read_manifest(root: Path) -> dict | None:
    """The manifest of the data set in a folder, None where the folder is empty or not there.

    Raises:
        FileExistsError: There is something else.
    """
    if not root.exists():
        return None
    foreign = FileExistsError(
        f"deformed_shapes: root is {root}, expected a new or empty folder or a data set made by this program; "
        "nothing was changed there"
    )
    if not root.is_dir():
        raise foreign
    if not (root / _MANIFEST).exists():
        if any(file.name != f"{_MANIFEST}.tmp" for file in root.iterdir()):
            raise foreign
        return None
    try:
        manifest = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"]["name"] != _FORMAT["name"]:
            raise foreign
        _files(manifest["parameters"])
    except (ValueError, KeyError, TypeError):
        raise foreign from None
    return manifest


def _make_split(root: Path, split: str, parameters: dict, progress: tqdm) -> None:
    image_size = parameters["image_size"]
    images, annotations = [], []
    (root / split).mkdir(exist_ok=True)
    for index in range(parameters[f"num_{split}"]):
        pixels, layers = sample(
            parameters["seed"], split, index, difficulty=parameters["difficulty"], image_size=image_size
        )
        image = {"id": index + 1, "file_name": f"{index + 1:06d}.png", "width": image_size, "height": image_size}
        images.append(image)
        for annotation in annotate(layers):
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
        (root / split / image["file_name"]).write_bytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
        progress.update()
    content = {
        "info": {"description": f"deformed shapes, {split}", "version": str(_FORMAT["version"]), **parameters},
        "licenses": [],
        "images": images,
        "categories": [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)],
    }
    if split != "test":  # as COCO's test-dev: image info only
        content["annotations"] = annotations
    (root / _ANNOTATIONS[split]).write_text(json.dumps(content), encoding="utf-8")


def _integer(name: str, value, least: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"deformed_shapes: {name} is {value!r}, expected an integer") from None
    if value < least:
        raise ValueError(f"deformed_shapes: {name} is {value}, expected at least {least}")
    return value


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
    """Makes the data set, unless it is there already.

    Writes `root/{train,val,test}/*.png`, `root/annotations/instances_{train,val}.json`,
    `root/annotations/image_info_test-dev.json` and `root/dataset.json`. The last records the parameters and, once
    all else is there, that the data set is complete. One that is not complete or has other parameters is made anew;
    files that this program did not make stay.

    Args:
        root: Folder of the data set; it is made if need be.
        seed: At least 0. The same arguments (and versions of NumPy, OpenCV and Shapely) give the same bytes.
        difficulty: From 0 to 1; what it changes is in `Dials`.
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
    Dials.at(difficulty)
    parameters = {
        "seed": _integer("seed", seed, 0),
        "difficulty": float(difficulty),
        "image_size": _integer("image_size", image_size, MIN_IMAGE_SIZE),
        "num_train": _integer("num_train", num_train, 0),
        "num_val": _integer("num_val", num_val, 0),
        "num_test": _integer("num_test", num_test, 0),
    }
    root = Path(root)
    found = _read_manifest(root)
    wanted = {"format": _FORMAT, "complete": True, "parameters": parameters}
    if found == wanted and all((root / name).is_file() for name in _files(parameters)):
        return False

    root.mkdir(parents=True, exist_ok=True)
    if found:
        _write_manifest(root, found["parameters"], complete=False)
        for name in _files(found["parameters"]):
            (root / name).unlink(missing_ok=True)
    _write_manifest(root, parameters, complete=False)  # before anything else, so that the folder is known as ours
    (root / "annotations").mkdir(exist_ok=True)
    total = num_train + num_val + num_test
    with tqdm(total=total, desc="deformed shapes", unit="image", disable=None) as progress:
        for split in SPLITS:
            _make_split(root, split, parameters, progress)
    _write_manifest(root, parameters, complete=True)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dk_detection.datasets.deformed_shapes",
        description="Make the data set of deformed shapes, in COCO format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", type=float, default=DEFAULT_DIFFICULTY, help="from 0 (easy) to 1 (hard)")
    parser.add_argument("--image-size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--train", type=int, default=1500, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--test", type=int, default=100, help="number of test images")
    args = parser.parse_args(arguments)
    try:
        made = make(
            args.out,
            seed=args.seed,
            difficulty=args.difficulty,
            image_size=args.image_size,
            num_train=args.train,
            num_val=args.val,
            num_test=args.test,
        )
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{args.out}: {'made' if made else 'is complete already'}")


if __name__ == "__main__":
    main()
