"""Looks at COCO files before a run: how many objects of how many will be learned from and judged, which is the first
that is not, and why; and whether files and pictures that belong together agree.

The rules are those of the code that reads the files: `CocoDataset` and `LoadAnnotations` of MMDetection,
`load_coco_json` and `DatasetMapper` of Detectron2, `COCOeval` of pycocotools for both. What they leave out in silence
is counted. What makes them fail later, or gives wrong figures, raises ValueError with the place in the file.
"""

import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np

# So many pictures of a data set are opened before a run; all take as long as it takes to read the annotations of COCO.
SAMPLE = 1000
# How files of pictures end that are not cut off.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
# What the segmentation of an annotation is.
_MISSING, _NO_POLYGON, _POLYGONS, _RLE = range(4)


class Tally:
    """How many of a file's objects serve a purpose, and what is the matter with the others.

    Attributes:
        kept: Whether an object serves. [number of annotations], bool
        reasons: Why others do not, with their number and the first of them.
        remarks: On objects that do serve, in the same form.
    """

    def __init__(self, file: "CocoFile") -> None:
        self._file = file
        self.kept = np.ones(len(file.annotations), bool)
        self.reasons: list[str] = []
        self.remarks: list[str] = []

    def drop(self, where: np.ndarray, reason: str) -> None:
        """Leaves out the objects at `where` that are still kept."""
        where = where & self.kept
        self.reasons += self._count(where, reason)
        self.kept &= ~where

    def remark(self, where: np.ndarray, text: str) -> None:
        """Notes something about the objects at `where` that are still kept."""
        self.remarks += self._count(where & self.kept, text)

    def is_vain(self) -> bool:
        """Whether there are objects, and none of them serves."""
        return len(self.kept) > 0 and not self.kept.any()

    def _count(self, where: np.ndarray, text: str) -> list[str]:
        if not (number := np.count_nonzero(where)):
            return []
        first = int(where.argmax())
        return [f"{number:,} {text} (first: annotations[{first}], id {self._file.annotations[first]['id']})"]

    def __str__(self) -> str:
        counts = f"{np.count_nonzero(self.kept):,} of {len(self.kept):,} objects"
        return "; ".join([counts, *(f"not {reason}" for reason in self.reasons), *self.remarks])


class CocoFile:
    """The content of a COCO file, as far as it has to be in order for anybody.

    Args:
        content: What `json.load` gives.

    Raises:
        ValueError: It is not what it should be; the message says where.
    """

    def __init__(self, content) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, expected an object with images and categories")
        self.content = content
        self.images = self._section("images")
        self._image_at = self._index("images")
        self._texts("images", "file_name")
        self._sizes = np.stack([self._numbers("images", key, least=1) for key in ("width", "height")], axis=1)
        self.categories = self._section("categories")
        self._category_at = self._index("categories")
        self.names = self._texts("categories", "name")
        self.has_annotations = "annotations" in content  # COCO's image_info files have none
        self.annotations = self._section("annotations") if self.has_annotations else []
        self._index("annotations")

    @classmethod
    def read(cls, path: str) -> "CocoFile":
        """Reads a file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not what it should be; the message says where.
        """
        collects = gc.isenabled()
        gc.disable()  # millions of lists, none of them garbage: a third of the time
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except ValueError as error:
            raise ValueError(f"it is not valid JSON ({error})") from error
        finally:
            gc.freeze()  # nor need the collector look at them later
            if collects:
                gc.enable()
        return cls(content)

    def labels(self, classes: Sequence[str] | None = None, by_id: bool = False) -> list[str]:
        """Names of the categories in the order in which a framework numbers them.

        Args:
            classes: Those that are asked for. None: all.
            by_id: Sorted by their ids, as Detectron2 does, and not in the file's order, as MMDetection does.
        """
        categories = sorted(self.categories, key=lambda category: category["id"]) if by_id else self.categories
        return [category["name"] for category in categories if classes is None or category["name"] in classes]

    def known(self, classes: Sequence[str] | None = None) -> Tally:
        """The objects of pictures that the file has, and of the classes that are asked for.

        Args:
            classes: Names. None: all.

        Raises:
            ValueError: An object is of a category that the file does not have.
        """
        tally, category = Tally(self), self._category_of
        known = _few(self._image_at)
        tally.drop(self._image_of < 0, f"with an image_id that is none of the ids in 'images' ({known})")
        if classes is not None:
            wanted = np.array([name in classes for name in self.names], bool)
            tally.drop(~wanted[category], "of categories that are not asked for")
        return tally

    def without(self, kept: np.ndarray, classes: Sequence[str] | None = None) -> str:
        """Says which classes no annotation is of, as the end of a sentence; nothing where there is none.

        Args:
            kept: The annotations that count. [number of annotations], bool
            classes: The classes. None: all.
        """
        found = {self.names[i] for i in set(self._category_of[kept].tolist())}
        without = [name for name in self.labels(classes) if name not in found]
        return f"; none of {_few(without)}" if without else ""

    def learned_by_mmdet(
        self, classes: Sequence[str] | None = None, *, masks: bool, min_size: float = 0, rle: bool = True
    ) -> Tally:
        """The objects that a `CocoDataset` with `LoadAnnotations` gives a detector to learn from.

        Args:
            classes: The classes of the data set. None: all.
            masks: Whether masks are loaded.
            min_size: Smaller pictures are left out. Pixels
            rle: Whether masks may be run-length encoded (`poly2mask`).

        Raises:
            ValueError: The file makes it fail or learn something wrong; the message says where.
        """
        tally = self.known(classes)
        x, y, width, height = self._boxes.T
        image_width, image_height = self._sizes[self._image_of].T
        tally.drop(np.array([bool(entry.get("ignore")) for entry in self.annotations], bool), "with ignore set")
        tally.drop(self._numbers("annotations", "area") <= 0, "with an area of 0 or less")
        tally.drop((width < 1) | (height < 1), "with a box narrower than a pixel")
        inside = np.minimum(x + width, image_width) > np.maximum(x, 0)
        inside &= np.minimum(y + height, image_height) > np.maximum(y, 0)
        tally.drop(~inside, "with a box outside of the picture")
        if masks:
            self._require_masks(tally.kept)
        tally.drop(self._crowd, "crowds")
        if masks:
            tally.drop(self._masks == _NO_POLYGON, "without a polygon of 3 points or more")
        if masks and not rle:
            tally.drop(self._masks == _RLE, "with a run-length encoded mask where poly2mask=False")
        small = np.minimum(image_width, image_height) < min_size
        tally.drop(small, f"of pictures with a side below {min_size} pixels")
        return tally

    def learned_by_detectron2(self, *, masks: bool, rle: bool = False) -> Tally:
        """The objects that `load_coco_json` with `DatasetMapper` gives a detector to learn from.

        Args:
            masks: Whether masks are loaded.
            rle: Whether masks may be run-length encoded (mask format "bitmask").

        Raises:
            ValueError: As above.
        """
        tally = self.known()
        ignored = np.array([bool(entry.get("ignore")) for entry in self.annotations], bool)
        if ignored.any():
            raise ValueError(f"annotations[{ignored.argmax()}] has 'ignore' set, which Detectron2 does not take")
        tally.drop(self._crowd, "crowds")
        tally.drop(self._masks == _NO_POLYGON, "without a polygon of 3 points or more")  # even where no masks are used
        if masks:
            self._require_masks(tally.kept)
            if not rle and (encoded := tally.kept & (self._masks == _RLE)).any():
                raise ValueError(
                    f"annotations[{encoded.argmax()}] has a run-length encoded mask, and polygons are asked for; write "
                    "INPUT.MASK_FORMAT bitmask (YAML) or dataloader.train.mapper.instance_mask_format='bitmask'"
                )
        low, sizes = self._boxes[:, :2], self._sizes[self._image_of]
        extent = np.minimum(low + self._boxes[:, 2:], sizes) - np.maximum(low, 0)
        tally.drop((extent <= 1e-5).any(1), "with a box without area inside of the picture")
        tally.remark((extent < 1).any(1), "with a box narrower than a pixel")  # as of coordinates from 0 to 1
        return tally

    def judged(self, classes: Sequence[str] | None = None, *, masks: bool) -> Tally:
        """The objects that `COCOeval` expects a detector to find.

        Args:
            classes: The classes that are evaluated. None: all.
            masks: Whether masks are compared, and not boxes only.

        Raises:
            ValueError: As above.
        """
        tally = self.known(classes)
        for i, entry in enumerate(self.annotations):
            number = entry["id"]
            if not isinstance(number, int) or number < 1:
                why = "; a match with the object of id 0 counts as none" if number == 0 else ""
                raise ValueError(f"annotations[{i}]: id is {number!r}, expected a number from 1 on{why}")
        self._column("annotations", "iscrowd")
        area = self._numbers("annotations", "area")
        empty = (self._boxes[:, 2:] <= 0).any(1)
        if masks:
            self._require_masks(tally.kept)
            segmentations = [entry.get("segmentation") for entry in self.annotations]
            short = tally.kept & np.array(
                [type(s) is list and len(s) > 0 and len(s[0]) < 5 for s in segmentations], bool
            )
            if short.any():
                raise ValueError(
                    f"annotations[{short.argmax()}]: the first polygon of its segmentation has fewer than 3 points, "
                    "pycocotools takes it for a box and fails"
                )
            empty = self._masks == _NO_POLYGON
        tally.drop(self._crowd, "crowds")
        tally.drop((area < 0) | (area > 1e10), "with an area below 0 or above 1e10")
        tally.remark(empty, "that no detection can match, as they have no extent")
        return tally

    def check_pictures(self, folder: str, needed: np.ndarray | None = None, sample: int | None = None) -> int:
        """Checks that pictures are there, not empty, and of the sizes that the file says.

        Args:
            folder: What the file names begin at.
            needed: Which images will be opened. [number of images], bool; None: all
            sample: How many pictures at most, spread evenly, are opened to look at their size. None: all.

        Returns:
            How many were opened.

        Raises:
            ValueError: One is not right; the message says which.
        """
        images = [image for i, image in enumerate(self.images) if needed is None or needed[i]]
        paths = [os.path.join(folder, image["file_name"]) for image in images]
        sizes = [_size_of_file(path) for path in paths]
        for size, what in ((None, "there is no picture"), (0, "there is nothing in the picture")):
            if number := sizes.count(size):
                more = f" ({number:,} of {len(paths):,} alike)" if number > 1 else ""
                raise ValueError(f"{what} {paths[sizes.index(size)]}{more}")
        step = -(-len(images) // sample) if sample and images else 1
        for path, image in list(zip(paths, images, strict=True))[::step]:
            expected = (image["width"], image["height"])
            size = _size_of_picture(path)
            if size is None:
                raise ValueError(f"{path} is no picture that can be read")
            if size != expected:
                swapped = ", the other way round" if size == expected[::-1] else ""
                raise ValueError(
                    f"{path} is {size[0]} pixels wide and {size[1]} high, and the annotation file says {expected[0]} "
                    f"and {expected[1]}{swapped}"
                )
        return len(paths[::step])

    def images_of(self, kept: np.ndarray) -> np.ndarray:
        """Which images have one of some annotations.

        Args:
            kept: The annotations. [number of annotations], bool

        Returns:
            [number of images], bool
        """
        found = np.zeros(len(self.images), bool)
        found[self._image_of[kept & (self._image_of >= 0)]] = True
        return found

    # Columns of the tables. A value that no reader can use raises.

    def _section(self, name: str) -> list[dict]:
        entries = self.content.get(name)
        if not isinstance(entries, list):
            raise ValueError(f"it has no list '{name}'")
        if not entries and name != "annotations":
            raise ValueError(f"its list '{name}' is empty")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f"{name}[{i}] is {_short(entry)}, expected an object")
        return entries

    def _column(self, section: str, key: str) -> list:
        entries = getattr(self, section)
        try:
            return [entry[key] for entry in entries]
        except KeyError:
            i = next(i for i, entry in enumerate(entries) if key not in entry)
            raise ValueError(f"{section}[{i}] has no '{key}'") from None

    def _ids(self, section: str, key: str) -> list:
        ids = self._column(section, key)
        for i, value in enumerate(ids):
            if isinstance(value, (list, dict)) or value is None:
                raise ValueError(f"{section}[{i}]: {key} is {_short(value)}, expected a number")
        return ids

    def _index(self, section: str) -> dict:
        ids = self._ids(section, "id")
        index = {value: i for i, value in enumerate(ids)}
        if len(index) != len(ids):
            raise ValueError(f"the ids in '{section}' are not unique")
        return index

    def _texts(self, section: str, key: str) -> list[str]:
        values = self._column(section, key)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(f"{section}[{i}]: {key} is {_short(value)}, expected a text")
        return values

    def _numbers(self, section: str, key: str, least: float = -math.inf) -> np.ndarray:
        numbers = _as_numbers(self._column(section, key), lambda i: f"{section}[{i}]: {key}")
        if (low := numbers < least).any():
            raise ValueError(f"{section}[{low.argmax()}]: {key} is {numbers[low.argmax()]:g}, expected {least} or more")
        return numbers

    @cached_property
    def _image_of(self) -> np.ndarray:
        """The place of each annotation's picture in `images`, -1 where there is none. [number of annotations]"""
        return np.array([self._image_at.get(value, -1) for value in self._ids("annotations", "image_id")], np.int64)

    @cached_property
    def _category_of(self) -> np.ndarray:
        """The place of each annotation's category in `categories`. [number of annotations]"""
        ids = self._ids("annotations", "category_id")
        places = np.array([self._category_at.get(value, -1) for value in ids], np.int64)
        if (unknown := places < 0).any():
            i, known = int(unknown.argmax()), _few(self._category_at)
            raise ValueError(f"annotations[{i}]: category_id {ids[i]!r} is none of the ids in 'categories' ({known})")
        return places

    @cached_property
    def _boxes(self) -> np.ndarray:
        """x, y, width and height. [number of annotations, 4]"""
        boxes = self._column("annotations", "bbox")
        for i, box in enumerate(boxes):
            if type(box) is not list or len(box) != 4:
                raise ValueError(f"annotations[{i}]: bbox is {_short(box)}, expected [x, y, width, height]")
        values = [value for box in boxes for value in box]
        return _as_numbers(values, lambda i: f"annotations[{i // 4}]: bbox[{i % 4}]").reshape(-1, 4)

    @cached_property
    def _crowd(self) -> np.ndarray:
        values = [entry.get("iscrowd", 0) for entry in self.annotations]
        for i, value in enumerate(values):
            if value not in (0, 1):
                raise ValueError(f"annotations[{i}]: iscrowd is {_short(value)}, expected 0 or 1")
        return np.array(values, bool)

    @cached_property
    def _masks(self) -> np.ndarray:
        """What each segmentation is. [number of annotations]"""
        return np.array([self._mask_kind(i, entry) for i, entry in enumerate(self.annotations)], np.int8)

    def _mask_kind(self, i: int, annotation: dict) -> int:
        mask = annotation.get("segmentation")
        if not mask:
            return _MISSING
        if type(mask) is list and all(map(_is_numbers, mask)):
            whole = any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask)
            return _POLYGONS if whole else _NO_POLYGON
        what = f"annotations[{i}]: segmentation is {_short(mask)}"
        if type(mask) is list:
            raise ValueError(f"{what}, expected polygons of numbers [[x, y, x, y, ...], ...]")
        if type(mask) is not dict or not isinstance(mask.get("size"), list) or not mask.get("counts"):
            raise ValueError(f"{what}, expected polygons or an RLE with counts and size")
        width, height = self._sizes[self._image_of[i]]
        if self._image_of[i] >= 0 and mask["size"] != [height, width]:
            raise ValueError(
                f"annotations[{i}]: segmentation is an RLE of size {mask['size']}, and the file says of its picture "
                f"that it is {height:g} high and {width:g} wide"
            )
        counts, pixels = mask["counts"], math.prod(mask["size"])
        if not isinstance(counts, str) and not (_is_numbers(counts) and sum(counts) == pixels):
            raise ValueError(f"{what}, expected counts that add up to {pixels}, the product of its size")
        return _RLE

    def _require_masks(self, kept: np.ndarray) -> None:
        if (missing := kept & (self._masks == _MISSING)).any():
            raise ValueError(f"annotations[{missing.argmax()}] has no 'segmentation', and masks are asked for")


def check_labels(labels: Sequence[str], expected: Sequence[str], source: str) -> None:
    """Checks that a file numbers classes as they are numbered elsewhere.

    Args:
        labels: Classes in the order of the labels that the file gives them.
        expected: In the order that they have elsewhere.
        source: Where that is, in words.

    Raises:
        ValueError: They do not.
    """
    if list(labels) != list(expected):
        unlike = [i for i, (a, b) in enumerate(zip(labels, expected)) if a != b]  # noqa: B905
        where = f", unlike from label {unlike[0]} on" if unlike else ""
        raise ValueError(
            f"its categories are {_few(labels)} ({len(labels)}), and those of {source} are {_few(expected)} "
            f"({len(expected)}){where}; they have to be the same, in the same order"
        )


@contextmanager
def handed_on(contents: dict[str, dict]) -> Iterator[None]:
    """While it lasts, pycocotools takes the content of some files from here and does not read them again.

    Once for each file, as readers change what they have read. `COCO` has no other way in than a path; but to set
    `dataset` and to call `createIndex`, as its constructor does, is what pycocotools itself does in `loadRes`.

    Args:
        contents: By real path. What has been taken is removed.
    """
    from pycocotools.coco import COCO

    original = COCO.__init__

    def init(self, annotation_file=None):
        content = contents.pop(os.path.realpath(annotation_file), None) if annotation_file else None
        original(self, annotation_file if content is None else None)
        if content is not None:
            self.dataset = content
            self.createIndex()

    COCO.__init__ = init
    try:
        yield
    finally:
        COCO.__init__ = original


def _as_numbers(values: list, name: Callable[[int], str]) -> np.ndarray:
    """An array of finite numbers; `name(i)` says what the i-th is."""
    if set(map(type, values)) <= {int, float}:
        numbers = np.array(values, np.float64)
        if (finite := np.isfinite(numbers)).all():
            return numbers
        i = int((~finite).argmax())
    else:
        i = next(i for i, value in enumerate(values) if type(value) not in (int, float))
    raise ValueError(f"{name(i)} is {_short(values[i])}, expected a number")


def _is_numbers(value) -> bool:
    """Whether something is a list of finite numbers."""
    try:
        return type(value) is list and math.isfinite(sum(value))
    except TypeError:
        return False


def _size_of_file(path: str) -> int | None:
    """Bytes; None where there is no file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _loads(picture) -> bool:
    try:
        picture.load()
    except (OSError, SyntaxError):  # of a PNG
        return False
    return True


def _last_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.stat(path).st_size - 64))
        return file.read()


def _size_of_picture(path: str) -> tuple[int, int] | None:
    """Width and height as both frameworks see a picture: turned as its EXIF data says. None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as picture:  # reads the header only
            if picture.format in _ENDS and _ENDS[picture.format] not in _last_bytes(path) and not _loads(picture):
                return None  # OpenCV would fill it up
            # In a PNG the pixels would have to be read to come to the EXIF entry.
            turned = picture.format in ("JPEG", "MPO", "TIFF") and picture.getexif().get(0x0112, 1) >= 5
            return picture.size[::-1] if turned else picture.size
    except OSError:  # of a picture in a format that it does not know, too
        import cv2  # which knows others

        picture = cv2.imread(path, cv2.IMREAD_COLOR)
        return None if picture is None else picture.shape[1::-1]


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _few(values) -> str:
    """The first values and the last as text."""
    values = [repr(value) for value in values]
    return ", ".join(values if len(values) <= 6 else [*values[:5], "...", values[-1]])
