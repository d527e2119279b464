"""Data sets on disk: made once, made anew when the parameters change, and never taken for complete when they are not.

A manifest, `dataset.json`, records the parameters and, once all else is there, that the data set is complete.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

_MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Format:
    """What a data set consists of.

    Attributes:
        name: Told apart from others by it.
        version: Raised when the same parameters give other files.
        files: Gives, from the parameters, all files but the manifest, relative to the data set's folder.
        write: Writes those files into a folder, given it and the parameters; yields after each image. The folders of
            the files are there.
    """

    name: str
    version: int
    files: Callable[[dict], list[str]]
    write: Callable[[Path, dict], Iterator[None]]


def make_once(root: str | os.PathLike, form: Format, parameters: dict) -> bool:
    """Makes a data set, unless it is there already.

    One that is not complete or has other parameters is made anew; files that this program did not make stay.

    Args:
        root: Its folder, which is made if need be.
        parameters: What the manifest records; numbers of images have keys that begin with "num_".

    Returns:
        True if the data set was made, False if it was there.

    Raises:
        FileExistsError: `root` is a file, or a folder with other things in it.
    """
    root = Path(root)
    names = form.files(parameters)
    found = _read_manifest(root, form)
    if found == _manifest(form, parameters, complete=True) and all((root / name).is_file() for name in names):
        return False

    root.mkdir(parents=True, exist_ok=True)
    if found:
        _write_manifest(root, _manifest(form, found["parameters"], complete=False))
        for name in form.files(found["parameters"]):
            (root / name).unlink(missing_ok=True)
    # Before anything else, so that the folder is known as ours.
    _write_manifest(root, _manifest(form, parameters, complete=False))
    for folder in {(root / name).parent for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(value for key, value in parameters.items() if key.startswith("num_"))
    for _ in tqdm(form.write(root, parameters), total=total, desc="deformed shapes", unit="image", disable=None):
        pass
    _write_manifest(root, _manifest(form, parameters, complete=True))
    return True


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes an image [H, W, 3], RGB, or [H, W], grey; uint8."""
    pixels = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def _manifest(form: Format, parameters: dict, complete: bool) -> dict:
    return {"format": {"name": form.name, "version": form.version}, "complete": complete, "parameters": parameters}


def _write_manifest(root: Path, manifest: dict) -> None:
    temporary = root / f"{_MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, root / _MANIFEST)  # at no time is there half a manifest


def _read_manifest(root: Path, form: Format) -> dict | None:
    """The manifest of the data set in a folder, None where the folder is empty or not there.

    Raises:
        FileExistsError: There is something else.
    """
    if not root.exists():
        return None
    foreign = FileExistsError(
        f"deformed_shapes: root is {root}, expected a new or empty folder or a data set of the same kind "
        f"({form.name}) made by this program; nothing was changed there"
    )
    if not root.is_dir():
        raise foreign
    if not (root / _MANIFEST).exists():
        if any(file.name != f"{_MANIFEST}.tmp" for file in root.iterdir()):
            raise foreign
        return None
    try:
        manifest = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"]["name"] != form.name:
            raise foreign
        form.files(manifest["parameters"])
    except (ValueError, KeyError, TypeError):
        raise foreign from None
    return manifest
