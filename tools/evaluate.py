#!/usr/bin/env python
"""Scores detections as the papers do, with intervals, and compares two detectors on the same images.

python tools/evaluate.py --ann instances_val2017.json --results RESULTS.json ...
python tools/evaluate.py --ann instances_val2017.json --compare A.json B.json
python tools/evaluate.py --config CONFIG --checkpoint CKPT
"""

import argparse
import json
import os
import sys
from contextlib import suppress

import detections

COMPARED = ("B - A", "95% interval", "B is ahead in", "p")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = detections.new_parser(
        prog="evaluate.py",
        usage="%(prog)s --ann FILE (--results FILE ... | --compare A B) [options]\n"
        "       %(prog)s --config CONFIG --checkpoint CKPT [options]",
        description="Print COCO's figures of boxes and masks, 0 to 100, with 95%% intervals.",
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="is B better than A? Two files, or folders")
    parser.add_argument("--categories", action="store_true", help="the figures of each category, too")
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the images, for intervals; 0: none (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (default: 0)")
    parser.add_argument(
        "--backend",
        choices=("pycocotools", "hotcoco"),
        default="pycocotools",
        help="the same figures; hotcoco is faster",
    )
    parser.add_argument("--json", metavar="FILE", help="the figures, for other programs")
    args = parser.parse_args(argv)
    if args.compare:
        if args.results or args.config:
            parser.error("--compare takes the place of --results and --config")
        if args.resamples < 1:
            parser.error("--compare needs --resamples of at least 1")
    else:
        detections.check_arguments(parser, args)
    if not args.config and not args.ann:
        parser.error("--ann is needed, the annotations that detections are compared with")
    if args.resamples < 0 or args.seed < 0:
        parser.error("--resamples and --seed must not be negative")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from dk_detection.evaluation.results import ImageSet

    if args.compare:
        compare(args, ImageSet.read(args.ann))
    elif found := detections.find_detections(args):
        score(args, *found)


def score(args: argparse.Namespace, images, results: list[str]) -> None:
    from dk_detection.complexity.counting import format_table
    from dk_detection.evaluation.average_precision import FIGURES, KINDS, intervals, resampled_figures

    record, rows, tables = {}, [], []
    for kind, evaluation in evaluations(args, images, results).items():
        figures = evaluation.figures()
        record[KINDS[kind]] = {"figures": figures}
        rows.append([KINDS[kind], *map(detections.number, figures.values())])
        if args.resamples:
            bounds = intervals(resampled_figures(evaluation, args.resamples, args.seed))
            record[KINDS[kind]]["intervals"] = bounds
            rows.append(["", *(detections.number(low, high) for low, high in bounds.values())])
        if args.categories:
            record[KINDS[kind]]["categories"] = evaluation.per_category()
            tables.append(
                format_table(
                    [f"{KINDS[kind]}, category", *FIGURES],
                    [[name, *map(detections.number, row.values())] for name, row in evaluation.per_category().items()],
                )
            )
    note = f"{images.name}, {len(images.images)} images, COCO metric, 0 to 100"
    if args.resamples:
        note += f"; below, 95% intervals from {args.resamples} resamples of the images"
    print("\n\n".join([f"{note}\n\n{format_table(['', *FIGURES], rows)}", *tables]))
    if args.json:
        write_json(args.json, dict(images=images.name, resamples=args.resamples, seed=args.seed, **record))


def compare(args: argparse.Namespace, images) -> None:
    from dk_detection.complexity.counting import format_table
    from dk_detection.errors import UserError
    from dk_detection.evaluation.average_precision import FIGURES, KINDS
    from dk_detection.evaluation.average_precision import compare as compare_evaluations

    a, b = (evaluations(args, images, [path]) for path in args.compare)
    if not (kinds := [kind for kind in a if kind in b]):
        raise UserError(f"{args.compare[0]} and {args.compare[1]} have nothing in common, one has boxes, one masks")
    record, rows = {}, []
    for kind in kinds:
        found = compare_evaluations(a[kind], b[kind], args.resamples, args.seed)
        record[KINDS[kind]] = {name: vars(difference) for name, difference in found.items()}
        rows.append([f"{KINDS[kind]}, A", *map(detections.number, a[kind].figures().values())])
        rows.append(["B", *map(detections.number, b[kind].figures().values())])
        columns = [COMPARED, *map(compared, found.values())]
        rows += map(list, zip(*columns, strict=True))
    note = (
        f"{images.name}, {len(images.images)} images, COCO metric, 0 to 100; {args.resamples} resamples of the images"
    )
    print("\n".join([f"A: {args.compare[0]}", f"B: {args.compare[1]}", note, "", format_table(["", *FIGURES], rows)]))
    if args.json:
        write_json(args.json, dict(images=images.name, resamples=args.resamples, seed=args.seed, **record))


def compared(difference) -> tuple[str, ...]:
    """What is to be said of a figure's difference, in the order of COMPARED."""
    if difference.value != difference.value:  # undefined
        return ("-",) * len(COMPARED)
    low, high = difference.interval
    return (
        f"{difference.value:+.1f}",
        f"{low:+.1f} to {high:+.1f}",
        f"{100 * difference.certainty:.1f}%",
        f"{difference.p_value:.3f}",
    )


def evaluations(args: argparse.Namespace, images, results: list[str]) -> dict:
    """The evaluation of each kind of detections that is in some files."""
    from dk_detection.evaluation.average_precision import Evaluation
    from dk_detection.evaluation.results import by_kind, kinds_of, read_results

    truth = images.with_annotations()
    loaded = {path: list(read_results(path, images)) for path in results}
    chosen = by_kind({path: kinds_of(entries[0]) if entries else ["bbox"] for path, entries in loaded.items()})
    return {kind: Evaluation(truth, loaded[path], kind, args.backend) for kind, path in chosen.items()}


def write_json(path: str, record: dict) -> None:
    from dk_detection.errors import UserError

    record = json.loads(json.dumps(record), parse_constant=lambda constant: None)  # JSON has no NaN
    whole = os.path.realpath(path)
    draft = whole if os.path.exists(whole) and not os.path.isfile(whole) else f"{whole}.part"  # a device stays one
    try:
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
        os.replace(draft, whole)
    except OSError as error:
        if draft != whole:
            with suppress(OSError):
                os.unlink(draft)
        raise UserError(f"--json {path}: the file cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(detections.run(main, sys.argv[1:]))
