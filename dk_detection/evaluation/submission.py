"""Packs results for COCO's test server: what its rules ask for, and no more bytes than that.

A package is `detections_SET_ALG_results.zip` and holds one file, `detections_SET_ALG_results.json`. Numbers go without
the digits that float32 does not have: boxes are rounded to 0.0001 pixels, and cut at the edge of their image; scores
are rounded to nine digits. Masks go without their boxes: pycocotools, and so the server, takes the area of an object
from the box where there is one, and then small, medium and large masks are told apart by their boxes. The same results
give the same bytes.
"""

import io
import json
import os
import re
import zipfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from dk_detection.errors import UserError
from dk_detection.evaluation.results import ImageSet, by_kind, kinds_of, read_results, read_unchecked

MAX_PER_IMAGE = 100  # COCO's rule


@dataclass(frozen=True)
class Package:
    """A package that was made.

    Attributes:
        kind: "bbox" or "segm".
        path: The zip file.
        detections: How many are in it.
        dropped: How many are not, since their images have 100 others of higher or equal score.
        empty_images: How many images have none.
    """

    kind: str
    path: Path
    detections: int
    dropped: int
    empty_images: int


def pack(results: list[str], images: ImageSet, algorithm: str, out: str) -> list[Package]:
    """Makes the packages of boxes and of masks, each in a folder of its own, `bbox` and `segm`, under the same name.

    Args:
        results: A file of each kind (MMDetection) or one with both (Detectron2); or the folder of an inference. Boxes
            are taken from a file without masks if there is one.
        images: The set that the results are of.
        algorithm: Part of the name: letters, digits and hyphens.
        out: Where the packages go.

    Raises:
        UserError: The results break a rule, or a package cannot be written. Then nothing is left under its name.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+", algorithm):
        raise UserError(f"the name {algorithm!r} must be of letters, digits and hyphens")
    stem = f"detections_{images.name}_{algorithm}_results"
    sources = {path: _Source(path, images) for path in results}
    chosen = by_kind({path: source.kinds for path, source in sources.items()})
    packages = []
    for source in sources.values():
        kinds = [kind for kind, path in chosen.items() if path == source.path]
        paths = [Path(out, kind, f"{stem}.zip") for kind in kinds]
        _write(source, kinds, paths, stem)
        dropped = int((~source.kept).sum())
        packages += [
            Package(kind, path, len(source.kept) - dropped, dropped, source.empty_images)
            for kind, path in zip(kinds, paths, strict=True)
        ]
    return packages


class _Source:
    """Results that were read and checked once.

    Attributes:
        kinds: What is in them, of "bbox" and "segm".
        kept: Whether each detection is among the best of its image. [detections]
        empty_images: How many images have no detection.
    """

    def __init__(self, path: str, images: ImageSet) -> None:
        self.path, self.images = path, images
        numbers = {image: number for number, image in enumerate(images.images)}
        which, scores = array("i"), array("d")
        self.kinds = []
        for entry in read_results(path, images):
            self.kinds = self.kinds or kinds_of(entry)
            which.append(numbers[entry["image_id"]])
            scores.append(entry["score"])
        if not which:
            raise UserError(f"{path}: there is no detection in it, and the server does not accept that")
        which = np.asarray(which)
        order = np.lexsort((-np.asarray(scores), which))  # stable: of equal scores the first of the file comes first
        counts = np.bincount(which, minlength=len(numbers))
        rank = np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts)
        self.kept = np.zeros(len(which), bool)
        self.kept[order[rank < MAX_PER_IMAGE]] = True
        self.empty_images = int((counts == 0).sum())

    def __iter__(self) -> Iterator[dict]:
        return compress(read_unchecked(self.path, self.images), self.kept)


def _write(source: _Source, kinds: list[str], paths: list[Path], stem: str) -> None:
    formats = {"bbox": _format_box, "segm": _format_mask}
    try:
        with _packages(paths, stem) as members:
            for number, entry in enumerate(source):
                size = source.images.images[entry["image_id"]]
                for kind, member in zip(kinds, members, strict=True):
                    member.write((",\n" if number else "[\n") + formats[kind](entry, size))
            for member in members:
                member.write("\n]\n")
    except OSError as error:
        names = " and ".join(map(str, paths))
        raise UserError(f"{names} cannot be written ({error.strerror}); nothing was left under the name") from error


@contextmanager
def _packages(paths: list[Path], stem: str):
    """Files to be filled; they get their names when all is well, and go otherwise."""
    drafts = [path.with_name(f"{path.name}.part") for path in paths]
    archives, members = [], []
    try:
        for draft in drafts:
            draft.parent.mkdir(parents=True, exist_ok=True)
            archives.append(zipfile.ZipFile(draft, "w"))
            info = zipfile.ZipInfo(f"{stem}.json", date_time=(1980, 1, 1, 0, 0, 0))  # the same bytes at any time
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            members.append(io.TextIOWrapper(archives[-1].open(info, "w", force_zip64=True), encoding="utf-8"))
        yield members
        for member in members:
            member.close()
        for archive in archives:
            archive.close()
        for draft, path in zip(drafts, paths, strict=True):
            os.replace(draft, path)
    except BaseException:
        for file in members + archives:
            with suppress(Exception):  # the first error is the one to tell
                file.close()
        for draft in drafts:
            draft.unlink(missing_ok=True)
        raise


def _format_box(entry: dict, size: tuple[int, int]) -> str:
    x, y, width, height = entry["bbox"]
    left, top = round(min(max(x, 0), size[1]), 4), round(min(max(y, 0), size[0]), 4)
    width = max(round(min(x + width, size[1]) - left, 4), 0)
    height = max(round(min(y + height, size[0]) - top, 4), 0)
    return (
        f'{{"image_id":{entry["image_id"]},"category_id":{entry["category_id"]},'
        f'"bbox":[{left},{top},{width},{height}],"score":{entry["score"]:.9g}}}'
    )


def _format_mask(entry: dict, size: tuple[int, int]) -> str:
    return (
        f'{{"image_id":{entry["image_id"]},"category_id":{entry["category_id"]},'
        f'"segmentation":{{"size":[{size[0]},{size[1]}],"counts":{json.dumps(entry["segmentation"]["counts"])}}},'
        f'"score":{entry.get("mask_score", entry["score"]):.9g}}}'
    )
