#!/usr/bin/env python
"""Trains several configs of MMDetection with several seeds each and writes a table of their AP, mean and spread.

    python tools/compare.py --configs A.py B.py --seeds 0 1 2 --out table.md

Each run is one of `tools/train_net.py --resume` in a folder of its own: an interrupted comparison goes on where it was,
and what is finished is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

TRAIN_NET = Path(__file__).with_name("train_net.py")
METRICS = {"coco/bbox_mAP": "box AP", "coco/segm_mAP": "mask AP"}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, type=Path, metavar="CONFIG")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the table, in Markdown")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare"), metavar="DIR")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs")
    args = parser.parse_args(argv)
    stems = [path.stem for path in args.configs]
    for what, values in (("--configs", stems), ("--seeds", args.seeds)):
        if twice := [value for value in values if values.count(value) > 1]:
            parser.error(f"{what}: {twice[0]} is given twice")
    if missing := [str(path) for path in args.configs if not path.is_file()]:
        parser.error(f"--configs: there is no {missing[0]}")
    return args


def train(config: Path, seed: int, work_dir: Path, options: list[str]) -> dict[str, float]:
    """Trains to the end, from wherever an earlier call got to. Returns those metrics that the config asks for.

    Where nothing was detected there are none at all; then they are 0.
    """
    options = [*options, f"randomness.seed={seed}"]
    command = [sys.executable, TRAIN_NET, "--config", config, "--work-dir", work_dir, "--resume", "--cfg-options"]
    subprocess.run([*command, *options], check=True)
    metrics = json.loads((work_dir / "val.metrics.json").read_text(encoding="utf-8"))["metrics"]
    return {name: 100 * metrics.get(key, 0.0) for key, name in METRICS.items() if key in metrics or not metrics}


def table(results: dict[str, dict[int, dict[str, float]]], options: list[str]) -> str:
    """One row a config: mean and sample standard deviation over the seeds, and the single figures."""
    seeds = sorted({seed for runs in results.values() for seed in runs})
    lines = [
        f"COCO metric, 0 to 100; mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}, and in "
        f"brackets each of them. torch {torch.__version__}, {'GPU' if torch.cuda.is_available() else 'CPU'}.",
        *(["", f"Settings over the configs': `{' '.join(options)}`"] if options else []),
        "",
        f"| config | {' | '.join(METRICS.values())} |",
        f"|---|{'---|' * len(METRICS)}",
    ]
    for stem, runs in results.items():
        cells = [f"`{stem}`"]
        for name in METRICS.values():
            values = [runs[seed][name] for seed in sorted(runs) if name in runs[seed]]
            if not values:
                cells.append("-")
                continue
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread} ({', '.join(f'{value:.1f}' for value in values)})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    results = {config.stem: {} for config in args.configs}
    jobs = [(seed, config) for seed in args.seeds for config in args.configs]
    for done, (seed, config) in enumerate(jobs):
        print(f"compare.py: run {done + 1} of {len(jobs)}: {config.stem}, seed {seed}", flush=True)
        try:
            results[config.stem][seed] = train(
                config, seed, args.work_dir / config.stem / f"seed{seed}", args.cfg_options
            )
        except subprocess.CalledProcessError as error:  # train_net.py has said why
            return error.returncode
        except KeyboardInterrupt:
            print("compare.py: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        done_so_far = {stem: runs for stem, runs in results.items() if runs}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table(done_so_far, args.cfg_options), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
