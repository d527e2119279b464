"""What a classifier of the deformed shapes needs beside mmpretrain: its images, and its figures by deformation."""

import csv
import functools
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, TRANSFORMS

DEFORMATIONS = ("scale", "rotation", "shear", "warp")


@TRANSFORMS.register_module(force=True)
class DkColourDistance:
    """Loads an image as the distance of each pixel's colour from the image's median colour.

    Object and background of the deformed shapes have any colour. A network that is told which pixels differ from most
    of the image learns the forms in minutes on a CPU. What was loaded stays in memory.

    Args:
        size: Width and height of the result in pixels; the image is shrunk to it before, by areas.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, results: dict) -> dict:
        """Adds "img", [size, size, 1], uint8, 255 where the distance is largest, and its shapes."""
        image = _colour_distance(results["img_path"], self.size).copy()
        return {**results, "img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2]}


@functools.cache
def _colour_distance(path: str, size: int) -> np.ndarray:
    image = cv2.imread(path)
    if image is None:
        raise FileNotFoundError(f"DkColourDistance: {path} is no image that OpenCV can read")
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    distance = np.linalg.norm(image - np.median(image.reshape(-1, 3), 0), axis=-1, keepdims=True)
    return (distance * (255 / max(distance.max(), 1))).astype(np.uint8)


@METRICS.register_module(force=True)
class DkAccuracyByDeformation(BaseMetric):
    """Accuracy in percent, of all images and by how strongly the object is deformed.

    The figures are "accuracy", and for each of scale, rotation, shear and warp "accuracy_scale_1" to
    "accuracy_scale_4": that of the quarter of the images with the smallest objects, ..., with the largest; for the
    others by the size of the deformation, whatever its sign.

    Args:
        table: The data set's table of deformations, `meta/val.csv`.
        prefix: Stands before the names of the figures, with a slash.
    """

    def __init__(self, table: str, prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        self.table = table

    def process(self, data_batch, data_samples) -> None:
        for sample in data_samples:
            path, label = Path(sample["img_path"]), sample["gt_label"].item()
            correct = sample["pred_score"].argmax().item() == label
            self.results.append((f"{path.parent.name}/{path.name}", correct))

    def compute_metrics(self, results: list[tuple[str, bool]]) -> dict[str, float]:
        with open(self.table, encoding="utf-8", newline="") as file:
            rows = {row["file"]: row for row in csv.DictReader(file)}
        correct = 100 * torch.tensor([correct for _, correct in results], dtype=torch.float64)
        figures = {"accuracy": correct.mean().item()}
        for name in DEFORMATIONS:
            strength = torch.tensor([abs(float(rows[file][name])) for file, _ in results], dtype=torch.float64)
            for number, quarter in enumerate(correct[strength.argsort(stable=True)].tensor_split(4), start=1):
                figures[f"accuracy_{name}_{number}"] = quarter.mean().item()
        return figures
