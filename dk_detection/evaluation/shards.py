"""Keeps the results of a long inference on disk as they come, so that it can be killed and go on.

A folder holds one file for each process, `shard-0.jsonl` and so on, with a line for each image that is finished, and
`inference.json`, which says what the results are of. A line is written at once and counts when it is whole. The files
may come from runs with different numbers of processes; an image that is in two of them counts once.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dk_detection.errors import UserError

_HEAD = re.compile(rb'\{"image_id":(-?\d+),')
_MANIFEST = "inference.json"


def claim(folder: str, **identity: bytes) -> None:
    """Takes a folder for an inference, a new one or one that has been begun.

    Args:
        folder: Made, if it is not there.
        identity: What decides about the results, by the names that a message calls it.

    Raises:
        UserError: The folder holds results of something else, or cannot be made.
    """
    path = Path(folder, _MANIFEST)
    digests = {name: hashlib.sha256(value).hexdigest() for name, value in identity.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            draft = path.with_name(f"{_MANIFEST}.{os.getpid()}")  # each of several processes writes the same
            draft.write_text(json.dumps(digests, indent=2), encoding="utf-8")
            draft.replace(path)
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: the results of an inference cannot be kept there ({error})") from error
    if changed := [name for name, digest in digests.items() if there.get(name) != digest]:
        raise UserError(
            f"{folder} holds the results of an inference with other {' and '.join(changed)}: choose another folder, or "
            "remove it"
        )


def finished(folder: str) -> dict[int, tuple[Path, int]]:
    """Where the results of each finished image are: the file, and the place of the line in it."""
    places = {}
    for path in sorted(Path(folder).glob("shard-*.jsonl")):
        place = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # killed while it was written
                head = _HEAD.match(line)
                if not head:
                    raise UserError(f"{path}, line {number}: this is not the result of an image; remove the file")
                places.setdefault(int(head[1]), (path, place))
                place += len(line)
    return places


def read(folder: str, image_ids: Iterator[int]) -> Iterator[dict]:
    """The detections of an inference, image by image, so that their order does not depend on how it went.

    Args:
        folder: Where the inference keeps its results.
        image_ids: The images, in the order wanted.

    Raises:
        UserError: An image is not finished yet.
    """
    places = finished(folder)
    image_ids = list(image_ids)
    if missing := len([image for image in image_ids if image not in places]):
        raise UserError(f"{folder}: {missing} of {len(image_ids)} images are not finished: run the inference again")
    files = {path: open(path, "rb") for path, _ in places.values()}  # noqa: SIM115  (closed below)
    try:
        for image in image_ids:
            path, place = places[image]
            files[path].seek(place)
            for detection in json.loads(files[path].readline())["detections"]:
                yield {"image_id": image, **detection}
    finally:
        for file in files.values():
            file.close()


class Writer:
    """Appends the results of finished images.

    Args:
        folder: As given to `claim`.
        process: Number of this process.

    Raises:
        UserError: The file is being written by another run, or cannot be written.
    """

    def __init__(self, folder: str, process: int = 0) -> None:
        self.path = Path(folder, f"shard-{process}.jsonl")
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (until `close`)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(self.path, "rb") as file:
                self._file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another run is writing there") from error
        except OSError as error:
            raise UserError(f"{self.path}: the file cannot be written ({error})") from error

    def write(self, image_id: int, detections: list[dict]) -> None:
        """Keeps the detections of an image, objects as in a COCO result file without their `image_id`.

        Raises:
            UserError: The disk is full, or fails.
        """
        line = json.dumps({"image_id": image_id, "detections": detections}, separators=(",", ":"))
        rest = memoryview(line.encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error
            raise UserError(
                f"{self.path}: {reason}; what is finished is kept, and the same command goes on from there"
            ) from error

    def close(self) -> None:
        self._file.close()
