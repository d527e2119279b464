#!/usr/bin/env python
"""Trains several configs of one framework with several seeds each, and says how they differ and how sure that is.

    python tools/compare.py --configs A.py B.py C.py --seeds 0 1 2 --out table.md

Each run is one of `tools/train_net.py --resume` in a folder of its own. Its figures are a line of table.jsonl, beside
table.md; what is there is not trained again, so that an interrupted comparison goes on where it was. Seed after seed is
run, so that a part of a comparison is one, too. Options may also come from a file, `tools/compare.py @FILE`, one word
a line.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import train_net

from dk_detection.config_files import MMENGINE, framework_of, is_lazy_config
from dk_detection.evaluation.seeds import Difference, Mean, holm

# By the names that evaluators have for them: what the table calls a figure, and what makes it a percentage.
METRICS = {
    "coco/bbox_mAP": ("box AP", 100),
    "coco/segm_mAP": ("mask AP", 100),
    "bbox/AP": ("box AP", 1),
    "segm/AP": ("mask AP", 1),
    "accuracy": ("accuracy", 1),
    "mIoU": ("mIoU", 1),
}
PACKAGES = ("torch", "numpy", "mmengine", "mmcv", "mmdet", "mmpretrain", "mmsegmentation", "detectron2")
INTERRUPTED = (130, 143)
FEWEST_PAIRS = 3  # the interval of two differences is wider than twelve standard deviations
MOST_SINGLE = 5  # with more seeds the table would be too wide for single figures


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument("--configs", nargs="+", required=True, type=Path, metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.md", help="the table; figures: FILE.jsonl")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("A", "B"),
        help="compare config B with config A, by stems; may be repeated (default: all with the first)",
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare"), metavar="DIR")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs")
    args = parser.parse_args(argv)
    stems = [path.stem for path in args.configs]
    for what, values in (("--configs", stems), ("--seeds", args.seeds)):
        if twice := [value for value in values if values.count(value) > 1]:
            parser.error(f"{what}: {twice[0]} is given twice")
    if missing := [str(path) for path in args.configs if not path.is_file()]:
        parser.error(f"--configs: there is no {missing[0]}")
    if args.out.suffix == ".jsonl":
        parser.error(f"--out: {args.out} is for the table; name a file like {args.out.with_suffix('.md')}")
    args.pair = args.pair or [[stems[0], stem] for stem in stems[1:]]
    if unknown := [stem for pair in args.pair for stem in pair if stem not in stems]:
        parser.error(f"--pair: {unknown[0]} is no stem of --configs")
    return args


class Records:
    """The figures of finished runs, a line of JSON each; a run is told by config, seed and options."""

    def __init__(self, path: Path, options: list[str]) -> None:
        self.path, self.options, self.runs = path, options, {}
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            lines = text.splitlines()
            if text and not text.endswith("\n"):  # killed while it wrote
                lines.pop()
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            for record in map(json.loads, lines):
                if record["options"] == options:
                    self.runs[record["config"], record["seed"]] = record

    def add(self, record: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.runs[record["config"], record["seed"]] = record


def train(config: Path, seed: int, work_dir: Path, options: list[str]) -> int:
    """Trains to the end, from wherever an earlier call got to. Returns the exit status of train_net.py."""
    command = ["--config", str(config), "--resume"]
    if framework_of(config) == MMENGINE:
        return train_net.main(
            [*command, "--work-dir", str(work_dir), "--cfg-options", *options, f"randomness.seed={seed}"]
        )
    if is_lazy_config(config):
        return train_net.main([*command, *options, f"train.output_dir={work_dir}", f"train.seed={seed}"])
    words = [word for option in options for word in option.split("=", 1)]
    return train_net.main([*command, *words, "OUTPUT_DIR", str(work_dir), "SEED", str(seed)])


def record_of(config: Path, work_dir: Path) -> dict:
    """What a finished run left in its folder: its figures and the course of its loss, [[iteration, loss], ...]."""
    metrics, losses = {}, {}
    if framework_of(config) == MMENGINE:
        metrics = json.loads((work_dir / "val.metrics.json").read_text(encoding="utf-8"))["metrics"]
        for log in sorted(work_dir.glob("*/vis_data/scalars.json")):  # a folder for each time that the run was started
            for entry in _lines(log):
                if "loss" in entry:
                    losses[entry.get("iter", entry["step"])] = round(entry["loss"], 4)
    else:
        for entry in _lines(work_dir / "metrics.json"):  # one for all times that the run was started
            iteration = entry.pop("iteration")
            if "total_loss" in entry:
                losses[iteration + 1] = round(entry["total_loss"], 4)
            else:  # an evaluation; the last one counts
                metrics = _as_pycocotools(entry)
    return {"metrics": {name: round(value, 6) for name, value in metrics.items()}, "loss": sorted(losses.items())}


def _as_pycocotools(metrics: dict[str, float]) -> dict[str, float]:
    """Detectron2 says NaN for -1, there was nothing to find, and for every figure where nothing was detected."""
    undefined = [math.isnan(value) for value in metrics.values()]
    return {} if all(undefined) else {name: -1.0 if math.isnan(value) else value for name, value in metrics.items()}


def _lines(path: Path) -> Iterator[dict]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def circumstances() -> dict:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions}


def figure(record: dict, key: str) -> float:
    """A figure in percent; NaN where it is undefined, which pycocotools says by -1: there was nothing to find.

    Where nothing was detected the evaluator gives no figures at all; then they are 0.
    """
    metrics = record["metrics"]
    value = metrics.get(key, math.nan) if metrics else 0.0
    return METRICS[key][1] * value if value >= 0 else math.nan


def short_names(stems: list[str]) -> dict[str, str]:
    """Stems without those of their parts that all of them have."""
    parts = [stem.split("_") for stem in stems]
    common = set.intersection(*map(set, parts)) if len(stems) > 1 else set()
    return {
        stem: "_".join(part for part in split if part not in common) or stem
        for stem, split in zip(stems, parts, strict=True)
    }


def table(records: Records, configs: list[Path], seeds: list[int], pairs: list[list[str]]) -> str:
    """Means with intervals, then differences pair by pair, in Markdown."""
    stems = [path.stem for path in configs]
    runs = {stem: {seed: records.runs[stem, seed] for seed in seeds if (stem, seed) in records.runs} for stem in stems}
    every = [record for by_seed in runs.values() for record in by_seed.values()]
    names = short_names(stems)
    keys = [key for key in METRICS if any(key in record["metrics"] for record in every)]
    threads, devices, torches = (
        ", ".join(sorted({str(value) for value in values}))
        for values in (
            (record["threads"] for record in every),
            (record["device"] for record in every),
            (record["versions"]["torch"] for record in every),
        )
    )
    lines = [
        "Percent; mean ± half the width of its 95% interval (Student's t) over the seeds "
        f"{', '.join(map(str, seeds))}, as far as they are finished.",
        f"{devices}, threads: {threads}, torch {torches}.",
        *(["", f"Settings over the configs': `{' '.join(records.options)}`"] if records.options else []),
        "",
        f"| config | seeds | {' | '.join(METRICS[key][0] for key in keys)} | seconds a run |",
        f"|---|---|{'---|' * len(keys)}---|",
    ]
    undefined = False
    for stem, by_seed in runs.items():
        if not by_seed:
            continue
        cells = [f"`{names[stem]}`", str(len(by_seed))]
        for key in keys:
            values = [figure(record, key) for record in by_seed.values()]
            cells.append(_mean_cell(values, singly=len(seeds) <= MOST_SINGLE))
            undefined |= any(map(math.isnan, values))
        seconds = sorted(record["seconds"] for record in by_seed.values())
        lines.append(f"| {' | '.join([*cells, f'{seconds[len(seconds) // 2]:.0f}'])} |")
    if undefined:
        lines += ["", "undefined: the evaluator has no such figure, or had nothing to find; left out of the means."]
    for key in keys:
        lines += _differences(runs, key, pairs, names)
    return "\n".join(lines) + "\n"


def _mean_cell(values: list[float], singly: bool) -> str:
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return "undefined"
    mean = Mean.of(defined)
    cell = f"{mean.value:.1f}" + ("" if math.isnan(mean.margin) else f" ± {mean.margin:.1f}")
    if singly:
        cell += f" ({', '.join('undefined' if math.isnan(value) else f'{value:.1f}' for value in values)})"
    elif len(defined) < len(values):
        cell += f" ({len(values) - len(defined)} undefined)"
    return cell


def _differences(runs: dict, key: str, pairs: list[list[str]], names: dict[str, str]) -> list[str]:
    """Of those pairs that have enough seeds in common."""
    found = []
    for before, after in pairs:
        values = [
            (figure(runs[before][seed], key), figure(runs[after][seed], key))
            for seed in sorted(runs[before].keys() & runs[after].keys())
        ]
        values = [pair for pair in values if not any(map(math.isnan, pair))]
        if len(values) >= FEWEST_PAIRS:
            found.append((before, after, Difference.of(*zip(*values, strict=True))))
    if not found:
        return []
    lines = [
        "",
        f"Differences in {METRICS[key][0]}, paired by seed; p of the paired t-test, corrected for the "
        f"{len(found)} comparisons by Holm's method, and of Wilcoxon's signed-rank test:",
        "",
        "| | difference | 95% interval | ahead in | p (t) | p (Holm) | p (Wilcoxon) |",
        "|---|---|---|---|---|---|---|",
    ]
    for (before, after, difference), corrected in zip(found, holm([entry[2].t for entry in found]), strict=True):
        mean = difference.mean
        lines.append(
            f"| `{names[after]}` less `{names[before]}` | {mean.value:+.1f} "
            f"| {mean.value - mean.margin:+.1f} to {mean.value + mean.margin:+.1f} "
            f"| {difference.ahead} of {difference.seeds} "
            f"| {difference.t:.2g} | {corrected:.2g} | {difference.wilcoxon:.2g} |"
        )
    return lines


def time_left(records: Records, jobs: list[tuple[int, Path]]) -> str:
    """How long the jobs will take, judged by the records."""
    seconds = {}
    for (stem, _), record in records.runs.items():
        seconds.setdefault(stem, []).append(record["seconds"])
    if not seconds:
        return ""
    means = {stem: sum(values) / len(values) for stem, values in seconds.items()}
    usual = sum(means.values()) / len(means)
    minutes = sum(means.get(config.stem, usual) for _, config in jobs) / 60
    return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    records = Records(args.out.with_suffix(".jsonl"), args.cfg_options)
    jobs = [(seed, config) for seed in args.seeds for config in args.configs]
    todo = [(seed, config) for seed, config in jobs if (config.stem, seed) not in records.runs]

    # Other settings, other runs: those must not be taken for finished.
    settings = [hashlib.sha256(json.dumps(args.cfg_options).encode()).hexdigest()[:8]] if args.cfg_options else []

    def write_table() -> str:
        text = table(records, args.configs, args.seeds, args.pair)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        return text

    for done, (seed, config) in enumerate(todo):
        number = len(jobs) - len(todo) + done + 1
        left = time_left(records, todo[done:])
        print(f"compare.py: run {number} of {len(jobs)}: {config.stem}, seed {seed}{left}", flush=True)
        start = time.monotonic()
        work_dir = args.work_dir / config.stem / "_".join([f"seed{seed}", *settings])
        code = train(config, seed, work_dir, args.cfg_options)
        if code:  # train_net.py has said why
            if code in INTERRUPTED:
                print("compare.py: interrupted; the same command goes on from here", file=sys.stderr)
            return code
        run = {"config": config.stem, "seed": seed, "options": args.cfg_options, **record_of(config, work_dir)}
        records.add({**run, "seconds": round(time.monotonic() - start, 1), **circumstances()})
        write_table()
    print(write_table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
