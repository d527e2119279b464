#!/usr/bin/env python
"""Detects objects in your pictures: python tools/predict.py --config CONFIG --checkpoint CKPT --images FOLDER."""

import argparse
import json
import os
import sys
from pathlib import Path

# mmengine's checkpoints hold more than tensors, and torch 2.6 and later load those only when told to.
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Draw the objects that a detector finds in pictures, and write them to one JSON in COCO's format.",
        epilog="Checkpoints are loaded as Python pickles, which can run code: use those that you trust only.",
    )
    parser.add_argument("--config", required=True, metavar="CONFIG", help="a config of MMDetection or Detectron2")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="its weights")
    parser.add_argument(
        "--images", required=True, type=Path, metavar="PATH", help="a folder of pictures, or one picture"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR",
        help="gets vis/, the pictures, and predictions.json (default: predictions)",
    )  # fmt: skip
    parser.add_argument("--score", type=float, default=0.3, metavar="S", help="least of an object (default: 0.3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="OPTION", help="override settings, as in tools/train_net.py"
    )
    return parser.parse_args(argv)


def find_pictures(path: Path) -> list[Path]:
    from dk_detection.errors import UserError

    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--images: there is no {path}")
    if found := sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES):
        return found
    raise UserError(f"--images: {path} holds no picture, no file that ends in {', '.join(sorted(SUFFIXES))}")


def predict(args: argparse.Namespace) -> dict:
    """Runs the detector. Gives a data set in COCO's format, whose objects have a score besides."""
    from dk_detection.config_files import DETECTRON2, framework_of
    from dk_detection.errors import UserError

    pictures, framework = find_pictures(args.images), framework_of(args.config)
    try:
        if framework == DETECTRON2:
            from dk_detection.detectron2.predict import predict
        else:
            from dk_detection.mmdet.predict import predict
    except ImportError as error:
        raise UserError(f"{args.config} is a config of {framework}. {error}") from error
    from pycocotools import mask as rle

    options = dict(score=args.score, device=args.device, options=args.cfg_options)
    classes, results = predict(args.config, args.checkpoint, pictures, args.out, **options)
    ids = {name: number + 1 for number, name in enumerate(classes)}
    images, annotations = [], []
    for picture, ((height, width), objects) in zip(pictures, results, strict=True):
        images.append(dict(id=len(images) + 1, file_name=picture.name, height=height, width=width))
        for i, label in enumerate(objects.labels):
            x1, y1, x2, y2 = objects.boxes[i].tolist()
            annotation = dict(
                id=len(annotations) + 1,
                image_id=len(images),
                category_id=ids.setdefault(label, len(ids) + 1),
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=(x2 - x1) * (y2 - y1),
                iscrowd=0,
                score=objects.scores[i].item(),
            )
            if objects.masks is not None:
                mask = rle.encode(objects.masks[i].numpy().astype("uint8", order="F"))
                annotation.update(area=float(rle.area(mask)), segmentation=dict(mask, counts=mask["counts"].decode()))
            annotations.append(annotation)
        print(f"{args.out / 'vis' / picture.name}: {len(objects.labels)} objects", flush=True)
    categories = [dict(id=number, name=name) for name, number in ids.items()]
    return dict(images=images, annotations=annotations, categories=categories)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        from dk_detection.errors import UserError
    except ImportError as error:
        return fail(f"{error}: run `make setup`, and use .venv/bin/python instead of {sys.executable}")
    try:
        data_set = predict(args)
        path = args.out / "predictions.json"
        path.write_text(json.dumps(data_set), encoding="utf-8")
    except (UserError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted", code=130)
    print(path)
    return 0


def fail(message, code: int = 1) -> int:
    print(f"predict.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
