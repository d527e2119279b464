"""A miniature of PASCAL VOC's folders: two pictures for training and two for the test, with all classes in either."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
WIDTH, HEIGHT = 96, 64
# Corners of the n-th object of a picture: inclusive pixels, counted from 1.
BOXES = [(1 + 9 * i, 1 + 4 * i, 14 + 9 * i, 24 + 4 * i) for i in range(10)]


def make(root: Path) -> Path:
    """VOC2007 and VOC2012 in a folder, which is returned."""
    random = np.random.default_rng(0)
    for year, lists in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        folder = root / f"VOC{year}"
        for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
            (folder / name).mkdir(parents=True)
        for split in lists:
            names = [f"{year}_{split}_{number}" for number in range(2)]
            (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))
            for number, name in enumerate(names):
                picture = random.integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"JPEGImages/{name}.jpg")
                objects = zip(CLASSES[10 * number : 10 * number + 10], BOXES, strict=True)
                (folder / f"Annotations/{name}.xml").write_text(annotation(objects))
    return root


def annotation(objects) -> str:
    text = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
        f"<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box in objects
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation>{size}{text}</annotation>"
