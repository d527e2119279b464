#!/usr/bin/env python
"""Packs detections for COCO's test server, and checks all that its rules ask for before a byte is written.

    python tools/make_submission.py --ann image_info_test-dev2017.json --alg NAME --results RESULTS.json ...
    python tools/make_submission.py --ann image_info_test-dev2017.json --alg NAME --config CONFIG --checkpoint CKPT \
        --image-folder test2017
"""

import argparse
import sys

import detections


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = detections.new_parser(
        prog="make_submission.py",
        usage="%(prog)s --ann FILE --alg NAME (--results FILE ... | --config CONFIG --checkpoint CKPT) [options]",
        description="Make the packages of boxes and of masks for COCO's test server.",
    )
    parser.add_argument("--alg", required=True, metavar="NAME", help="your name for the detector, a part of the file's")
    parser.add_argument("--out", default="submission", metavar="DIR", help="where packages go (default: submission)")
    parser.add_argument("--val", action="store_true", help="score the packages; --ann then has to hold the truth")
    args = parser.parse_args(argv)
    detections.check_arguments(parser, args)
    if not args.ann:
        parser.error("--ann is needed, for a submission image_info_test-dev2017.json")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from dk_detection.evaluation.average_precision import KINDS, Evaluation
    from dk_detection.evaluation.results import read_results
    from dk_detection.evaluation.submission import MAX_PER_IMAGE, pack

    if not (found := detections.find_detections(args)):
        return
    images, results = found
    annotations = images.with_annotations() if args.val else None
    for package in pack(results, images, args.alg, args.out):
        size = package.path.stat().st_size / 1e6
        print(f"{package.path}: {package.detections} {KINDS[package.kind]} detections, {size:.1f} MB")
        if package.empty_images:
            print(f"  {package.empty_images} of {len(images.images)} images have no detection")
        if package.dropped:
            print(f"  {package.dropped} detections were left out, beyond the best {MAX_PER_IMAGE} of an image")
        if args.val:
            figures = Evaluation(annotations, list(read_results(str(package.path), images)), package.kind).figures()
            print(f"  {', '.join(f'{name} {value:.1f}' for name, value in figures.items())} (0 to 100, {images.name})")


if __name__ == "__main__":
    sys.exit(detections.run(main, sys.argv[1:]))
