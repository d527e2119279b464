"""Whether the files of a data set of PASCAL VOC's kind are in order, before a run reads them.

Neither framework is needed here.
"""

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

SAMPLE = 1000  # annotations of a data set that are opened


def check_voc(images: str, pictures: str, annotations: str, classes: Sequence[str], sample: int = SAMPLE) -> str:
    """Checks a list of pictures, that each has its two files, and what some of the annotations say.

    Args:
        images: The file with the name of a picture in each line, ImageSets/Main/trainval.txt.
        pictures: The folder of NAME.jpg.
        annotations: The folder of NAME.xml.
        classes: What is learned.
        sample: How many annotations are opened, spread over the list.

    Returns:
        How many of their objects are of the classes, in words.

    Raises:
        ValueError: Something is missing or wrong.
    """
    try:
        with open(images, encoding="utf-8") as file:
            names = [line.split() for line in file if line.strip()]
    except OSError as error:
        raise ValueError(f"there is no list of pictures {images} ({error.strerror})") from error
    if not names:
        raise ValueError(f"the list {images} names no picture")
    if wrong := [words for words in names if len(words) != 1]:
        raise ValueError(
            f"the list {images} has the line {' '.join(wrong[0])!r}, expected the name of a picture; lists of one "
            "class, such as cat_trainval.txt, are no lists of a data set"
        )
    files = [[os.path.join(annotations, f"{name}.xml"), os.path.join(pictures, f"{name}.jpg")] for (name,) in names]
    for path in (path for pair in files for path in pair):
        if not os.path.isfile(path):
            raise ValueError(f"{images} names a picture without its file {path}")
    opened = [path for path, _ in files[:: -(-len(files) // sample)]]
    found = [name for path in opened for name in _objects(path)]
    known = sum(name in set(classes) for name in found)
    if not known:
        others = f"such as {found[0]!r}" if found else "and there are none at all"
        raise ValueError(f"{images}: no object of {len(opened)} pictures is of the classes, {others}")
    return f"{len(names)} pictures; {known} of {len(found)} objects of {len(opened)} of them are of the classes"


def _objects(path: str) -> list[str]:
    """The classes of the objects in an annotation, whose boxes are looked at."""
    try:
        root = ElementTree.parse(path).getroot()
        for side in ("width", "height"):
            if not int(root.findtext(f"size/{side}")) > 0:
                raise ValueError(f"size/{side} is {root.findtext(f'size/{side}')}, expected more than 0")
        names = []
        for each in root.findall("object"):
            box = [float(each.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if not (all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"a box is {box}, expected xmin < xmax and ymin < ymax")
            names.append(each.findtext("name", ""))
    except (OSError, ValueError, TypeError, ElementTree.ParseError) as error:
        raise ValueError(f"the annotation {path} is broken: {error}") from error
    return names
