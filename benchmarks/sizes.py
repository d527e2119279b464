#!/usr/bin/env python
"""How the cost grows: over 16 times the pixels and 16 times the channels, with one thread and with two, on the CPU.

    python benchmarks/sizes.py --json OUT.json --svg OUT.svg
    python benchmarks/sizes.py --draw OUT.json --svg OUT.svg

The picture shows picoseconds per multiply-add of the rigid convolution: a line that is level grows as that does, and
the distance of two lines is their ratio.
"""

import argparse
import json
import statistics
from pathlib import Path

import bench_deform_kernel_conv2d as bench
import torch
from common import BACKWARD, DTYPES, FORWARD, Settings, environment, measure

# [channels, height, width] of one image; the middle of both series is the same.
PIXELS = tuple((256, height, width) for height, width in ((25, 38), (35, 54), (50, 76), (71, 107), (100, 152)))
CHANNELS = tuple((channels, 50, 76) for channels in (64, 128, 256, 512, 1024))
SIZES = tuple(dict.fromkeys(PIXELS + CHANNELS))
KINDS = ("dense", "depthwise")
CONTENDERS = {
    "conv2d": bench.conv2d,
    "deform_conv2d": bench.dcn,
    "local DK": bench.dk,
    "local DK + DCN": bench.dk_dcn,
}


def label(kind: str, size: tuple[int, int, int]) -> str:
    return f"{kind} {'x'.join(map(str, size))}"


def measure_all(dtype: str, threads: list[int], rounds: int, seconds: float) -> dict:
    """{environment, rounds, medians: {threads: {case: {mode: {contender: seconds}}}}}"""
    medians = {}
    for count in threads:
        settings = Settings(torch.device("cpu"), DTYPES[dtype], count, rounds, seconds)
        cases = {
            label(kind, size): lambda settings, size=size, kind=kind: bench.make_case(
                (1, *size, size[0] if kind == "depthwise" else 1), settings
            )
            for kind in KINDS
            for size in SIZES
        }
        found = medians.setdefault(str(count), {})
        for result in measure(cases, CONTENDERS, settings):
            if result.seconds:
                modes = found.setdefault(result.case, {})
                modes.setdefault(result.mode, {})[result.contender] = statistics.median(result.seconds)
    facts = environment(settings)
    del facts["threads"]
    return {"environment": facts, "rounds": rounds, "medians": medians}


def draw(content: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "svg.hashsalt": "sizes", "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.4), layout="constrained", sharex="col", sharey="row")
    columns = [(kind, over) for kind in KINDS for over in ("pixels", "channels")]
    for (row, mode), (column, (kind, over)) in (
        (a, b) for a in enumerate((FORWARD, BACKWARD)) for b in enumerate(columns)
    ):
        axis = axes[row][column]
        for place, contender in enumerate(CONTENDERS):
            for threads, style in zip(content["medians"], ("-", "--"), strict=False):
                points = []
                for size in PIXELS if over == "pixels" else CHANNELS:
                    seconds = content["medians"][threads].get(label(kind, size), {}).get(mode, {}).get(contender)
                    if seconds is None:
                        continue
                    channels, height, width = size
                    products = bench.KERNEL**2 * channels * height * width * (channels if kind == "dense" else 1)
                    points.append((height * width if over == "pixels" else channels, 1e12 * seconds / products))
                if not points:  # interrupted
                    continue
                several = "threads" if threads != "1" else "thread"
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    marker=".",
                    color=f"C{place}",
                    label=f"{contender}, {threads} {several}",
                )
        axis.set(xscale="log", yscale="log")
        if row == 0:
            fixed = "256 channels" if over == "pixels" else "50 x 76 pixels"
            axis.set_title(f"{kind}, {fixed}")
        else:
            axis.set_xlabel(over)
        if column == 0:
            axis.set_ylabel(f"{mode}\nps per multiply-add")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the medians and the environment")
    parser.add_argument("--svg", type=Path, metavar="OUT", help="write the picture")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing, draw what was written before")
    args = parser.parse_args()
    if args.draw:
        content = json.loads(args.draw.read_text())
    else:
        content = measure_all(args.dtype, args.threads, 1 if args.quick else args.rounds, 0.02 if args.quick else 0.1)
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.svg:
        draw(content, args.svg)


if __name__ == "__main__":
    main()
