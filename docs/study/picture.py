"""Draws classifier.svg from classifier.jsonl, beside itself: losses, accuracies, and accuracy by deformation."""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np

from dk_detection.evaluation.seeds import Mean

HERE = Path(__file__).parent
DEFORMATIONS = ("scale", "rotation", "shear", "warp")
SHOWN = ("rigid", "gdk", "dk", "mdconv", "dkmdconv")  # more lines cannot be told apart


def read() -> dict[str, list[dict]]:
    """Records by row, in the order in which they were first run."""
    rows = defaultdict(list)
    for record in map(json.loads, (HERE / "classifier.jsonl").read_text(encoding="utf-8").splitlines()):
        name = record["config"].partition("_")[0].removeprefix("regnet-dw").removeprefix("-")
        rows[name or "rigid"].append(record)
    return rows


def main() -> None:
    rows = read()
    plt.rcParams.update({"font.size": 8, "svg.hashsalt": "study", "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
    losses, accuracies, *by_deformation = axes.flat
    for name in (name for name in SHOWN if name in rows):
        steps = [step for step, _ in rows[name][0]["loss"]]
        losses.plot(steps, np.mean([[loss for _, loss in record["loss"]] for record in rows[name]], 0), label=name)
        for axis, deformation in zip(by_deformation, DEFORMATIONS, strict=True):
            quarters = [
                np.mean([record["metrics"][f"accuracy_{deformation}_{quarter}"] for record in rows[name]])
                for quarter in range(1, 5)
            ]
            axis.plot(range(1, 5), quarters, marker=".")
    losses.set(xlabel="iteration", ylabel="training loss, mean over the seeds", yscale="log")
    losses.legend(frameon=False)
    for place, records in enumerate(rows.values()):
        values = [record["metrics"]["accuracy"] for record in records]
        mean = Mean.of(values)
        accuracies.plot(values, [place] * len(values), ".", color="0.7", markersize=4)
        margin = mean.margin if len(values) > 2 else np.nan  # that of two is wider than the picture
        accuracies.errorbar(mean.value, place, xerr=margin, fmt="o", color="black", capsize=3)
    accuracies.set_yticks(range(len(rows)), [f"{name} ({len(records)})" for name, records in rows.items()])
    accuracies.invert_yaxis()
    accuracies.set(xlabel="accuracy in percent: seeds, mean, 95% interval")
    for axis, deformation in zip(by_deformation, DEFORMATIONS, strict=True):
        axis.set(xlabel=f"quarter of the images by {deformation}", ylabel="accuracy in percent")
        axis.set_xticks(range(1, 5))
    figure.savefig(HERE / "classifier.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
