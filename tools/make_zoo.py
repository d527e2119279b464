#!/usr/bin/env python
"""Writes docs/zoo.md from configs/zoo.yml, and adds to that file what was counted or measured.

    python tools/make_zoo.py
    python tools/make_zoo.py --count
    python tools/make_zoo.py --add STEM --figures figures.json --framework mmdet --command COMMAND --seed 0 \
        --hardware HARDWARE --log LOG
"""

import argparse
import json
import sys
from pathlib import Path

import yaml
from command_line import run

from dk_detection.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
ZOO, PAGE = CONFIGS / "zoo.yml", ROOT / "docs" / "zoo.md"
FRAMEWORKS = {"mmdet": "MMDetection", "detectron2": "Detectron2"}

HEADER = """\
# One row for each config, under its stem: the papers' rows that it is, what it costs (tools/make_zoo.py --count), and
# the runs of it (tools/make_zoo.py --add), null until there is one. Figures are COCO's, 0 to 100; parameters are in
# millions, FLOPs in thousands of millions of multiply-adds. docs/zoo.md is made from this file.

"""
INTRODUCTION = """\
# Zoo

Every config of `configs/mmdet` and `configs/detectron2`, the papers' figures beside ours. Made by
`python tools/make_zoo.py` from `configs/zoo.yml`: do not edit this page.

Figures are COCO's AP, 0 to 100; behind a slash those of small, medium and large objects, in brackets the 95% interval
of ours. Parameters (millions) and FLOPs (thousands of millions of multiply-adds) are those of MMDetection's config at
800x1200 with 1000 RoIs, for the embedded data set at 128x128 with 100 RoIs ([rules](complexity.md)); in brackets the
paper's. The papers' figures on test-dev are of detectors that were trained on the images of val2017, too; no public
server scores test-dev any more ([evaluation.md](evaluation.md#the-test-server)). A row without figures of ours has not
been trained by us, and nothing is claimed for it.

To add yours, train a row, score it, and say how you got it:

```console
python tools/evaluate.py --config CONFIG --checkpoint CHECKPOINT --json figures.json
python tools/make_zoo.py --add STEM --figures figures.json --framework mmdet --command "COMMAND" --seed 0 \\
    --hardware "8 GPUs" --log LINK
```
"""
# Titles, and which rows are below them; the first that fits counts.
SECTIONS = {
    "Deformable ConvNets": lambda stem: "_240k_" in stem,
    "Deformable ConvNets v2, Faster R-CNN": lambda stem: "_dc5" in stem and "_16e_" in stem,
    "Deformable ConvNets v2, Mask R-CNN": lambda stem: "_16e_" in stem,
    "Deformable Kernels, Faster R-CNN": lambda stem: "_r50-dw" in stem or "_mobilenet" in stem,
    "With FPN, in 1x": lambda stem: stem.endswith("_coco"),
    "Deformed shapes, the embedded data set": lambda stem: True,
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_zoo.py", description="Write docs/zoo.md from configs/zoo.yml.", allow_abbrev=False
    )
    parser.add_argument(
        "--count", nargs="*", metavar="STEM", help="count parameters and FLOPs of these rows before (default: all)"
    )
    group = parser.add_argument_group("a run to add before; all of these are needed")
    group.add_argument("--add", metavar="STEM", help="which config was trained")
    group.add_argument("--figures", type=Path, metavar="FILE", help="what tools/evaluate.py --json has written")
    group.add_argument("--framework", choices=FRAMEWORKS)
    group.add_argument("--command", metavar="TEXT", help="that trained it")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument("--hardware", metavar="TEXT")
    group.add_argument("--log", metavar="TEXT", help="where the log of the training is")
    args = parser.parse_args(argv)
    given = [args.figures, args.framework, args.command, args.seed, args.hardware, args.log]
    if any(value is None for value in given) if args.add else any(value is not None for value in given):
        parser.error("--add goes with --figures, --framework, --command, --seed, --hardware and --log")
    return args


def read() -> dict[str, dict]:
    return yaml.safe_load(ZOO.read_text(encoding="utf-8"))


def write(zoo: dict[str, dict]) -> None:
    rows = (
        yaml.safe_dump({stem: row}, sort_keys=False, default_flow_style=None, width=200) for stem, row in zoo.items()
    )
    ZOO.write_text(HEADER + "\n".join(rows), encoding="utf-8")


def config_of(stem: str, framework: str) -> Path | None:
    found = (path for path in (CONFIGS / framework).rglob(f"{stem}.*") if path.parent.name != "_base_")
    return next(found, None)


def count(stem: str) -> dict[str, float]:
    """Parameters and FLOPs of a config."""
    from dk_detection.complexity.counting import total
    from dk_detection.mmdet.complexity import count_config

    small = stem.endswith("_deformed-shapes")
    part = total(count_config(config_of(stem, "mmdet"), *((128, 128), 100) if small else ((800, 1200), 1000)))
    return dict(parameters=round(part.parameters / 1e6, 2), gflops=round(part.multiply_adds / 1e9, 2))


def run_of(args: argparse.Namespace) -> dict:
    """The run to add.

    Raises:
        UserError: The file of figures is not what it should be.
    """
    try:
        record = json.loads(args.figures.read_text(encoding="utf-8"))
        run = dict(framework=args.framework, images=record["images"])
        for kind in filter(record.get, ("box", "mask")):
            figures, bounds = record[kind]["figures"], record[kind].get("intervals")
            run[kind] = {name: round(value, 1) for name, value in figures.items() if value is not None}
            if bounds:
                run[f"{kind}_interval"] = [round(value, 1) for value in bounds["AP"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{args.figures} is not what tools/evaluate.py --json writes ({error!r})") from error
    return run | dict(command=args.command, seed=args.seed, hardware=args.hardware, log=args.log)


def render(zoo: dict[str, dict]) -> str:
    """The page."""
    from dk_detection.complexity.counting import format_table

    parts, left = [INTRODUCTION], dict(zoo)
    for title, belongs in SECTIONS.items():
        rows = [line for stem in zoo if stem in left and belongs(stem) for line in lines(stem, left.pop(stem))]
        header = ("config", "paper", "images", "box AP", "mask AP", "ours, box", "ours, mask", "#P (M)", "GFLOPs")
        parts.append(f"## {title}\n\n{format_table(header, rows)}\n")
    runs = [
        f"- `{stem}`, {FRAMEWORKS[run['framework']]}: `{run['command']}`, seed {run['seed']}, {run['hardware']}; log: "
        f"{run['log']}\n"
        for stem, row in zoo.items()
        for run in row["runs"] or []
    ]
    parts.append(f"## How ours were got\n\n{''.join(runs) or 'There are none yet.'}".rstrip() + "\n")
    return "\n".join(parts)


def lines(stem: str, row: dict) -> list[tuple[str, ...]]:
    """The lines of a config: one for each of the papers' rows that it is, and at least one."""
    ours = ["; ".join(our_figure(run, kind) for run in row["runs"] or [] if kind in run) for kind in ("box", "mask")]
    found = []
    for number, paper in enumerate(row["paper"] or [{}]):
        costs = [f"{row[key]:.1f}" if not number else "" for key in ("parameters", "gflops")]
        costs = [
            f"{cost} ({paper[key]})" if key in paper else cost
            for cost, key in zip(costs, ("parameters", "gflops"), strict=True)
        ]
        found.append(
            (
                "" if number else f"`{stem}`",
                f"Table {paper['table']}, {paper['row']}" if paper else "",
                paper.get("images", ""),
                *(figure(paper.get(kind)) for kind in ("box", "mask")),
                *(("", "") if number else ours),
                *costs,
            )
        )
    return found


def figure(figures: dict | None) -> str:
    """40.8 / 21.3, 45.0, 58.5: AP, and those of small, medium and large objects where they are known."""
    if not figures:
        return ""
    sizes = [f"{figures[name]:.1f}" for name in "SML" if name in figures]
    return f"{figures['AP']:.1f}" + (f" / {', '.join(sizes)}" if sizes else "")


def our_figure(run: dict, kind: str) -> str:
    bounds = run.get(f"{kind}_interval")
    where = f"{FRAMEWORKS[run['framework']]}, {run['images']}"
    return f"{figure(run[kind])}{' ({} to {})'.format(*bounds) if bounds else ''}, {where}"


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    zoo = read()
    if args.add and args.add not in zoo:
        raise UserError(f"--add {args.add}: there is no such config in {ZOO.name}")
    if args.add:
        zoo[args.add]["runs"] = [*(zoo[args.add]["runs"] or []), run_of(args)]
    if args.count is not None:
        stems = args.count or list(zoo)
        if unknown := [stem for stem in stems if stem not in zoo]:
            raise UserError(f"--count {unknown[0]}: there is no such config in {ZOO.name}")
        for number, stem in enumerate(stems, 1):
            print(f"{number}/{len(stems)} {stem}", file=sys.stderr, flush=True)
            zoo[stem] |= count(stem)
    write(zoo)
    PAGE.write_text(render(zoo), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
