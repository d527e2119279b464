#!/usr/bin/env python
"""Says how many objects of COCO files will be learned from and judged, and what is the matter with the others.

    python tools/check_data.py train.json val.json --images pictures

Files that are given together have to number their categories alike. The exit status is 0 if everything is in order,
objects that are left out included; 1 if a run would fail or give wrong figures.
"""

import argparse
import sys

import numpy as np

try:
    from dk_detection.datasets.coco_check import CocoFile, Tally, check_labels
except ImportError as error:
    sys.exit(f"check_data.py: {error}: run `make setup`, and use .venv/bin/python instead of {sys.executable}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="annotation files, those for training first")
    parser.add_argument("--images", metavar="DIR", help="look at all pictures, too: what the file names begin at")
    parser.add_argument("--framework", choices=("mmdet", "detectron2"), help="whose rules count (default: both)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="the classes of the config (default: all)")
    return parser.parse_args(argv)


def uses(file: CocoFile, args: argparse.Namespace):
    """What the objects of a file may serve for, as names and functions that count them."""
    if not file.has_annotations:
        return
    masks = any(annotation.get("segmentation") for annotation in file.annotations)
    for kind, with_masks in (("boxes", False), *([("masks", True)] if masks else [])):
        if args.framework != "detectron2":
            yield f"MMDetection learns {kind}", lambda m=with_masks: file.learned_by_mmdet(args.classes, masks=m)
        if args.framework != "mmdet":
            yield f"Detectron2 learns {kind}", lambda m=with_masks: file.learned_by_detectron2(masks=m, rle=True)
        yield f"COCO metric judges {kind}", lambda m=with_masks: file.judged(args.classes, masks=m)


def row(name: str, count) -> tuple[bool, str]:
    """One row of the table: whether it is in order, and the text."""
    try:
        tally: Tally = count()
    except ValueError as error:
        return False, f"  {name:26}    fails  {error}"
    remarks = [f"not {reason}" for reason in tally.reasons] + tally.remarks
    return not tally.is_vain(), f"  {name:26}{np.count_nonzero(tally.kept):>9,}  {'; '.join(remarks)}".rstrip()


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    in_order, first = True, None
    for path in args.files:
        print(path)
        try:
            file = CocoFile.read(path)
        except (OSError, ValueError) as error:
            print(f"  cannot be read: {error}")
            in_order = False
            continue
        counts = (len(file.images), len(file.annotations), len(file.categories))
        print("  {:,} pictures, {:,} objects, {:,} categories".format(*counts))
        for name, count in uses(file, args):
            good, text = row(name, count)
            print(text, flush=True)
            in_order &= good
        first = first or file
        try:
            if args.framework != "detectron2":
                check_labels(file.labels(args.classes), args.classes or first.labels(), args.files[0])
            if args.framework != "mmdet":
                check_labels(file.labels(by_id=True), first.labels(by_id=True), args.files[0])
            if args.images:
                number = file.check_pictures(args.images)
                print(f"  {number:,} pictures are there, with the sizes that the file says")
        except ValueError as error:
            print(f"  {error}")
            in_order = False
    return 0 if in_order else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
