"""Reads COCO result files of any size, and checks every detection against the images that it should be of."""

import io
import json
import math
import os
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from json.decoder import JSONDecodeError

import numpy as np

from dk_detection.errors import UserError
from dk_detection.evaluation import shards

_OVERHANG = 1.0  # pixels that a box may reach beyond its image; frameworks round where images are resized
_BLOCK = 512  # detections checked at a time
_CHUNK = 2**20  # characters read at a time
_MAX_ENTRY = 2**24  # characters of one detection


@dataclass(frozen=True)
class ImageSet:
    """The images that results are of.

    Attributes:
        path: The annotation file, with annotations (val) or without (test-dev).
        content: What it holds.
        images: (height, width) of each image by its id, in the order of the file.
        categories: Names by ids.
    """

    path: str
    content: dict = field(repr=False)
    images: dict[int, tuple[int, int]] = field(repr=False)
    categories: dict[int, str] = field(repr=False)

    @classmethod
    def read(cls, path: str) -> "ImageSet":
        """Reads a COCO annotation file, as far as results are concerned.

        Raises:
            UserError: It cannot be read or is not what it should be.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: the annotation file cannot be read ({error})") from error
        tables = {}
        for section, keys in (("images", ("id", "height", "width")), ("categories", ("id",))):
            entries = content.get(section) if isinstance(content, dict) else None
            if not entries or not isinstance(entries, list):
                raise UserError(f"{path}: this is no COCO annotation file, it has no list of {section}")
            table = {}
            for i, entry in enumerate(entries):
                values = [entry.get(key) if isinstance(entry, dict) else None for key in keys]
                if any(type(value) is not int for value in values):
                    raise UserError(f"{path}: {section}[{i}] has no whole numbers {', '.join(keys)}")
                if values[0] in table:
                    raise UserError(f"{path}: {section}[{i}] has id {values[0]}, and so has one before it")
                table[values[0]] = tuple(values[1:]) if section == "images" else str(entry.get("name", values[0]))
            tables[section] = table
        return cls(path, content, **tables)

    @property
    def name(self) -> str:
        """test-dev2017 for image_info_test-dev2017.json, val2017 for instances_val2017.json."""
        match = re.fullmatch(r"(?:image_info|instances)_([A-Za-z0-9-]+)\.json", os.path.basename(self.path))
        if not match:
            raise UserError(
                f"{self.path}: the name of a set of images is taken from the file's, expected image_info_SET.json or "
                "instances_SET.json"
            )
        return match[1]

    def check_files(self, folder: str) -> None:
        """Checks that all images are there, before hours are spent on those that are.

        Raises:
            UserError: One is missing.
        """
        names = [str(image.get("file_name")) for image in self.content["images"]]
        if missing := [name for name in names if not os.path.isfile(os.path.join(folder, name))]:
            raise UserError(f"{folder}: {len(missing)} of {len(names)} images are not there, such as {missing[0]}")

    def with_annotations(self) -> dict:
        """What the file holds, if the truth is in it.

        Raises:
            UserError: It is not, as in the files of test sets.
        """
        if not self.content.get("annotations"):
            raise UserError(f"{self.path}: there are no annotations to compare with; those of test sets are not public")
        return self.content


def read_results(path: str, images: ImageSet) -> Iterator[dict]:
    """The detections of a result file, each of them checked. A few are in memory, and 8 bytes of each one before them.

    Args:
        path: A JSON array in COCO's format, a .zip with one, or the folder of an inference.
        images: What the detections are of.

    Returns:
        Objects with `image_id`, `category_id`, `score`, and `bbox` or `segmentation` or both; of what else there is
        in them nothing is known.

    Raises:
        UserError: The file cannot be read, is cut off, or is no JSON array; or a detection is not what it should be,
            or occurs twice.
    """
    hashes = array("q")
    kinds = None
    entries = read_unchecked(path, images)
    for first in count(step=_BLOCK):
        block = list(islice(entries, _BLOCK))
        index = first
        try:
            for entry in block:
                _check(entry, images)
                kinds = kinds or kinds_of(entry)
                if kinds_of(entry) != kinds:
                    raise ValueError(f"it is of {' and '.join(kinds_of(entry))}, those before of {' and '.join(kinds)}")
                index += 1
            if block and "segm" in kinds and not _fill(block):
                index, entry = next((first + i, entry) for i, entry in enumerate(block) if not _fill([entry]))
                mask = entry["segmentation"]
                raise ValueError(f"the mask's counts {_short(mask['counts'])} do not fill its size {mask['size']}")
        except ValueError as error:
            raise UserError(f"{path}: detection {index}: {error}") from error
        for entry in block:
            mask = entry["segmentation"]["counts"] if "segm" in kinds else None
            hashes.append(hash((entry["image_id"], entry["category_id"], entry["score"], *entry.get("bbox", ()), mask)))
        yield from block
        if len(block) < _BLOCK:
            break
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(np.diff(np.asarray(hashes)[order]) == 0)
    if len(again):
        first, second = order[again[0]], order[again[0] + 1]
        raise UserError(f"{path}: detection {second} is a copy of detection {first}; {len(again)} are copies")


def kinds_of(entry: dict) -> list[str]:
    """What a detection is of, in pycocotools' words: "bbox", "segm" or both."""
    return [kind for kind, key in (("bbox", "bbox"), ("segm", "segmentation")) if key in entry]


def by_kind(files: dict[str, list[str]]) -> dict[str, str]:
    """Which file the detections of each kind are taken from: boxes from one without masks, if there is one.

    MMDetection writes a file of boxes, and one of masks that have the boxes beside them.

    Args:
        files: The kinds of detections that are in each file.

    Raises:
        UserError: Nothing is taken from a file, as others have it.
    """
    chosen = {}
    for path, kinds in sorted(files.items(), key=lambda item: len(item[1])):
        for kind in kinds:
            chosen.setdefault(kind, path)
    if unused := [path for path in files if path not in chosen.values()]:
        raise UserError(f"{unused[0]}: the other files have what is in it")
    return dict(sorted(chosen.items()))


def read_unchecked(path: str, images: ImageSet) -> Iterator[object]:
    """As `read_results`, for what has been checked before."""
    if os.path.isdir(path):
        yield from shards.read(path, images.images)
        return
    try:
        with _open(path) as file:
            yield from _read_array(file)
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{path}: the result file cannot be read ({error})") from error


def _check(entry, images: ImageSet) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"it is {_short(entry)}, expected an object")
    for key in ("image_id", "category_id", "score"):
        if key not in entry:
            raise ValueError(f"it has no {key}")
    image, category, score = entry["image_id"], entry["category_id"], entry["score"]
    for key, value in (("image_id", image), ("category_id", category)):
        if type(value) is not int:
            raise ValueError(f"{key} is {_short(value)}, expected a whole number")
    if image not in images.images:
        raise ValueError(f"image_id {_short(image)} is not one of the {len(images.images)} images of {images.path}")
    if category not in images.categories:
        number, ids = len(images.categories), images.categories.keys()
        reason = (
            f"; the ids there are not contiguous, and labels from 0 to {number - 1} have to be mapped to them"
            if 0 <= category < number < max(ids)
            else ""
        )
        raise ValueError(
            f"category_id {_short(category)} is not one of the {number} categories of {images.path}, with ids from "
            f"{min(ids)} to {max(ids)}{reason}"
        )
    for key, value in (("score", score), ("mask_score", entry.get("mask_score", score))):
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ValueError(f"{key} is {_short(value)}, expected a number from 0 to 1")
    if "bbox" in entry:
        _check_box(entry["bbox"], images.images[image])
    if "segmentation" in entry:
        _check_mask(entry["segmentation"], images.images[image])
    elif "bbox" not in entry:
        raise ValueError("it has neither bbox nor segmentation")


def _check_box(box, size: tuple[int, int]) -> None:
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and -1e9 < v < 1e9 for v in box)):
        raise ValueError(f"bbox is {_short(box)}, expected four finite numbers, [x, y, width, height]")
    x, y, width, height = box
    if width < 0 or height < 0:
        raise ValueError(f"bbox is {_short(box)}, with a negative width or height")
    if min(x, y) < -_OVERHANG or x + width > size[1] + _OVERHANG or y + height > size[0] + _OVERHANG:
        raise ValueError(
            f"bbox is {_short(box)}, [x, y, width, height], and the image has {size[1]} x {size[0]} pixels"
        )


def _check_mask(mask, size: tuple[int, int]) -> None:
    if not (isinstance(mask, dict) and isinstance(mask.get("counts"), str) and isinstance(mask.get("size"), list)):
        raise ValueError(f"segmentation is {_short(mask)}, expected a compressed RLE, an object with size and counts")
    if mask["size"] != list(size) or any(type(side) is not int for side in mask["size"]):
        raise ValueError(f"the mask has the size {_short(mask['size'])}, its image {list(size)}, (height, width)")


def _fill(entries: list[dict]) -> bool:
    """Whether the run lengths of all masks are valid and add up to the areas of their images.

    pycocotools trusts what it is given, and would read beyond its memory or never end. In its format a run length is a
    signed number, lowest bits first, 5 bits a character from "0" on with a sixth that announces another one; from the
    fourth run on it is the difference to the run before the last.
    """
    counts = [entry["segmentation"]["counts"] for entry in entries]
    areas = [math.prod(entry["segmentation"]["size"]) for entry in entries]
    sizes = np.array([len(each) for each in counts])
    code = np.frombuffer("".join(counts).encode(errors="replace"), np.uint8).astype(np.int64) - 48
    if not sizes.all() or code.size != sizes.sum() or code.min() < 0 or code.max() > 63:
        return False
    ends = np.flatnonzero(code & 32 == 0)  # [runs], the last character of each
    last = np.searchsorted(ends, sizes.cumsum() - 1)  # [masks], the last run of each
    if not len(ends) or last[-1] == len(ends) or (ends[last] != sizes.cumsum() - 1).any():
        return False
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits; pycocotools has 32
        return False
    shifts = 5 * (np.arange(code.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((code & 31) << shifts, starts) - ((code[ends] >> 4 & 1) << 5 * lengths)

    first = np.concatenate([[0], last[:-1] + 1])
    owner = np.repeat(np.arange(len(first)), last - first + 1)
    rank = np.arange(len(runs)) - first[owner]
    for parity in (0, 1):
        chain = (rank % 2 == parity) & (rank > 0)
        sums = np.concatenate([[0], runs[chain].cumsum()])
        runs[chain] = sums[1:] - sums[np.searchsorted(owner[chain], owner[chain])]
    return bool(runs.min() >= 0 and (np.add.reduceat(runs, first) == areas).all())


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def _open(path: str) -> Iterator[io.TextIOBase]:
    if not zipfile.is_zipfile(path):
        with open(path, encoding="utf-8") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        if len(archive.namelist()) != 1:
            raise ValueError(f"the archive holds {len(archive.namelist())} files, expected one")
        with archive.open(archive.namelist()[0]) as member:
            yield io.TextIOWrapper(member, encoding="utf-8")


def _read_array(file) -> Iterator[object]:
    decode = json.JSONDecoder().raw_decode
    space = re.compile(r"[ \t\n\r]*")
    text, place, passed = "", 0, 0  # the part of the file in memory, where in it, how much was before it

    def skip() -> str:
        """The next character that is not a space, "" at the end of the file."""
        nonlocal text, place, passed
        while True:
            place = space.match(text, place).end()
            if place < len(text):
                return text[place]
            passed += len(text)
            text, place = file.read(_CHUNK), 0
            if not text:
                return ""

    if skip() != "[":
        raise ValueError("it is not a JSON array of detections")
    place += 1
    if skip() == "]":
        place += 1
    else:
        while True:
            skip()
            try:
                entry, place = decode(text, place)
            except JSONDecodeError as error:
                if len(text) - place > _MAX_ENTRY:
                    raise ValueError(f"a detection is longer than {_MAX_ENTRY} characters") from error
                if more := file.read(_CHUNK):
                    passed, text, place = passed + place, text[place:] + more, 0
                    continue
                where = f"character {passed + error.pos} of {passed + len(text)}"
                raise ValueError(f"{error.msg}, {where}") from error
            yield entry
            following = skip()
            place += 1
            if following == "]":
                break
            if following != ",":
                what = f"{following!r}" if following else "the end of the file"
                raise ValueError(f"expected ',' or ']' and found {what}, character {passed + place}")
    if skip():
        raise ValueError(f"there is more behind the array, character {passed + place}")
