"""A small data set that nobody has painted, and detections on it, some right and some wrong."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

CATEGORIES = {2: "ball", 3: "cube", 7: "cone"}


def truth(num_images: int, rng: np.random.Generator, objects: int = 6) -> dict:
    """Annotations of images of two sizes, with small, medium and large objects, a crowd and an image without any."""
    content = dict(
        images=[],
        annotations=[],
        categories=[dict(id=i, name=name) for i, name in CATEGORIES.items()],
    )
    for number in range(num_images):
        height, width = [(150, 200), (210, 160)][number % 2]
        image = dict(id=10 + 3 * number, file_name=f"{number}.png", height=height, width=width)
        content["images"].append(image)
        for _ in range(rng.integers(1, objects + 1) if number else 0):
            size = np.exp(rng.uniform(np.log(9), np.log(140))) * rng.uniform(0.8, 1.05, 2)
            corner = rng.uniform(0, [width - size[0], height - size[1]])
            mask = ellipse(height, width, corner, size)
            crowd = int(rng.random() < 0.05)
            content["annotations"].append(
                dict(
                    id=len(content["annotations"]) + 1,
                    image_id=image["id"],
                    category_id=int(rng.choice(list(CATEGORIES))),
                    bbox=rle.toBbox(mask).tolist(),
                    area=float(rle.area(mask)),
                    iscrowd=crowd,
                    segmentation=dict(size=[height, width], counts=mask["counts"].decode()),
                )
            )
    return content


def ellipse(height: int, width: int, corner, size) -> dict:
    """The RLE of the ellipse in a box."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = sum(((v - c - s / 2) / (s / 2)) ** 2 for v, c, s in zip((x, y), corner, size, strict=True)) <= 1
    return rle.encode(np.asfortranarray(inside, np.uint8))


def detections(content: dict, rng: np.random.Generator, error: float = 0.1, wrong: int = 3) -> list[dict]:
    """Boxes and masks as Detectron2 writes them: most objects, moved by a share of their size, and things not there."""
    found = []
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    candidates = [(a["image_id"], a["category_id"], a["bbox"], 1.0) for a in content["annotations"]]
    for image, (height, width) in sizes.items():
        for _ in range(wrong):
            size = rng.uniform(8, 80, 2)
            corner = rng.uniform(0, [width - size[0], height - size[1]])
            candidates.append((image, int(rng.choice(list(CATEGORIES))), [*corner, *size], 0.6))
    for image, category, (x, y, w, h), trust in candidates:
        if rng.random() < 0.1:
            continue
        height, width = sizes[image]
        left, top = (np.array([x, y]) + error * rng.normal(size=2) * [w, h]).clip(0, [width - 4, height - 4])
        size = ([w, h] * np.exp(error * rng.normal(size=2))).clip(4, [width - left, height - top])
        mask = ellipse(height, width, (left, top), size)
        found.append(
            dict(
                image_id=image,
                category_id=category,
                bbox=[float(np.float32(v)) for v in (left, top, *size)],
                score=float(np.float32(trust * rng.beta(3, 2))),
                segmentation=dict(size=[height, width], counts=mask["counts"].decode()),
            )
        )
    return found


def without(entries: list[dict], *keys: str) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in keys} for entry in entries]


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)
