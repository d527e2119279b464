"""Average precision as the papers print it, how sure it is, and which of two detectors is better.

The figures are those of pycocotools, in percent: AP over IoU 0.5 to 0.95, AP at 0.5 and 0.75, AP of small, medium and
large objects; at most 100 detections of an image and category. Undefined ones, without an object to find, are NaN.

The bootstrap asks how the figures would differ on as many other images of the same kind. Images are drawn with
replacement, as many as there are, and each figure is computed anew. Every image is compared with the truth once: a
resample only weighs it by the number of times that it was drawn. Repeated images raise AP (its precision is a maximum
over places of a curve, and a curve of fewer different images is rougher), so the resampled figures are moved until
their mean is the figure itself. Nothing of this speaks of another training of the same detector.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import numpy as np

from dk_detection.errors import UserError

FIGURES = ("AP", "AP50", "AP75", "S", "M", "L")
KINDS = {"bbox": "box", "segm": "mask"}  # pycocotools' names and ours
BACKENDS = ("pycocotools", "hotcoco")

# Where the figures are in an array [IoU thresholds, area ranges].
_PLACES = ((slice(None), 0), (0, 0), (5, 0), (slice(None), 1), (slice(None), 2), (slice(None), 3))
_RECALLS = np.linspace(0, 1, 101)  # pycocotools' 101 recall thresholds
_MAX_CELLS = 2**22  # detections x resamples at a time; bounds the memory


class Evaluation:
    """The detections of some images, compared with the truth.

    Args:
        annotations: The content of a COCO annotation file.
        results: Detections as in a COCO result file.
        kind: "bbox" or "segm".
        backend: The library that compares: "pycocotools", or "hotcoco", which gives the same bits and is faster.

    Raises:
        UserError: There are no results, or the library is not installed.
    """

    def __init__(self, annotations: dict, results: list[dict], kind: str, backend: str = "pycocotools") -> None:
        if not results:
            raise UserError("there is no detection to evaluate")
        self._input = annotations, results, kind
        self._comparison = _compare_with_truth(*self._input, backend)
        self._backend = backend
        self._precision = np.asarray(self._comparison.eval["precision"])[..., 0]  # [IoUs, recalls, categories, areas]
        names = {category["id"]: category["name"] for category in annotations["categories"]}
        self.categories = [names[i] for i in self._comparison.params.catIds]
        self.num_images = len(self._comparison.params.imgIds)

    def figures(self) -> dict[str, float]:
        """The figures of FIGURES, 0 to 100."""
        return _summarise(self._precision)

    def per_category(self) -> dict[str, dict[str, float]]:
        """The same for each category, by its name."""
        return {name: _summarise(self._precision[:, :, [i]]) for i, name in enumerate(self.categories)}

    def resample(self, weights: np.ndarray) -> np.ndarray:
        """The figures of resamples, exactly those that pycocotools would give for images that occur several times.

        Args:
            weights: How often each image occurs in each resample, images in the order of ids. [resamples, images]

        Returns:
            [resamples, figures], 0 to 100.
        """
        sums, counts = np.zeros((4, len(weights), 10)), np.zeros((4, len(weights), 1))  # over categories
        for curve in self._curves:
            value = curve.average_precision(weights)  # [resamples, IoUs]
            sums[curve.area] += np.nan_to_num(value)
            counts[curve.area] += ~np.isnan(value[:, :1])
        with np.errstate(invalid="ignore"):
            mean = (sums / counts).transpose(1, 2, 0)  # [resamples, IoUs, areas]
        return 100 * np.stack([mean[:, iou, area].reshape(len(mean), -1).mean(1) for iou, area in _PLACES], axis=1)

    @cached_property
    def _curves(self) -> list["_Curve"]:
        # hotcoco would hand its matches over as nested lists, slower than pycocotools finds them.
        comparison = self._comparison
        if self._backend != "pycocotools":
            comparison = _compare_with_truth(*self._input, "pycocotools")
        return list(_curves(comparison))


def draw(num_images: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each image occurs in resamples of as many images. [resamples, images]"""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=resamples)


def resampled_figures(evaluation: Evaluation, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """The figures of resamples around those of the evaluation. [resamples, figures]"""
    return _centred(evaluation.resample(draw(evaluation.num_images, resamples, seed)), evaluation.figures())


def intervals(resampled: np.ndarray) -> dict[str, tuple[float, float]]:
    """The interval of each figure that 95% of the resamples are in, 2.5% below and 2.5% above it. [resamples, figures]

    Resamples in which a figure is undefined are left out of it.
    """
    found = {}
    for name, column in zip(FIGURES, resampled.T, strict=True):
        column = column[~np.isnan(column)]
        found[name] = tuple(np.quantile(column, (0.025, 0.975)).tolist()) if len(column) else (np.nan, np.nan)
    return found


@dataclass(frozen=True)
class Difference:
    """How much a figure of B exceeds that of A.

    Attributes:
        value: B - A.
        interval: The 95% interval of the difference.
        certainty: The share of resamples in which B is ahead, ties by half.
        p_value: Two-sided: twice the share in which the one that is ahead is not.
    """

    value: float
    interval: tuple[float, float]
    certainty: float
    p_value: float


def compare(a: Evaluation, b: Evaluation, resamples: int = 1000, seed: int = 0) -> dict[str, Difference]:
    """Compares two detectors by a paired bootstrap: both are judged on the same images of each resample.

    Args:
        a, b: Evaluations of the same images.
        resamples: Number of resamples; no p-value is below 2 / (resamples + 1).
        seed: Of the random numbers.

    Raises:
        ValueError: The numbers of images differ.
    """
    if a.num_images != b.num_images:
        raise ValueError(f"compare: a has {a.num_images} images and b {b.num_images}, expected the same ones")
    weights = draw(a.num_images, resamples, seed)
    figures_a, figures_b = a.figures(), b.figures()
    values = {name: figures_b[name] - figures_a[name] for name in FIGURES}
    differences = _centred(b.resample(weights) - a.resample(weights), values)
    bounds = intervals(differences)
    found = {}
    for name, column in zip(FIGURES, differences.T, strict=True):
        column = column[~np.isnan(column)]
        ahead, behind = np.count_nonzero(column > 0), np.count_nonzero(column < 0)
        ties = len(column) - ahead - behind
        found[name] = Difference(
            value=values[name],
            interval=bounds[name],
            certainty=(ahead + ties / 2) / len(column) if len(column) else np.nan,
            p_value=min(1.0, 2 * (min(ahead, behind) + ties + 1) / (len(column) + 1)),
        )
    return found


def _centred(resampled: np.ndarray, figures: dict[str, float]) -> np.ndarray:
    """Moves resampled figures until their means are the figures. [resamples, figures]"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")
        return resampled - np.nanmean(resampled, axis=0) + [figures[name] for name in FIGURES]


@dataclass(frozen=True)
class _Curve:
    """The detections of a category in an area range, highest score first, as far as they matter.

    Attributes:
        area: Index of the area range.
        images: Index of each detection's image. [detections]
        hits: For each IoU threshold the indices of the detections that find an object.
        ignored: For each IoU threshold the indices of those that count neither as found nor as wrong.
        objects: How many objects there are to find in each image. [images]
    """

    area: int
    images: np.ndarray
    hits: list[np.ndarray]
    ignored: list[np.ndarray]
    objects: np.ndarray

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """[resamples, IoUs], 0 to 1; NaN where nothing is to be found."""
        step = max(1, _MAX_CELLS // max(1, len(self.images)))
        parts = [self._average_precision(weights[i : i + step]) for i in range(0, len(weights), step)]
        return np.concatenate(parts)

    def _average_precision(self, weights: np.ndarray) -> np.ndarray:
        objects = (weights @ self.objects)[:, None]
        weight = weights[:, self.images]  # [resamples, detections]
        seen = weight.cumsum(1)
        result = np.zeros((len(weights), len(self.hits)))
        for i, (hits, ignored) in enumerate(zip(self.hits, self.ignored, strict=True)):
            found = weight[:, hits].cumsum(1)  # true positives up to each hit
            skipped = np.pad(weight[:, ignored].cumsum(1), ((0, 0), (1, 0)))[:, np.searchsorted(ignored, hits)]
            # Precision is highest just after a hit, and recall rises only there: no other place matters. A detection
            # that occurs w times adds w to the sums; what lies between is on the way and matters neither.
            precision = found / (seen[:, hits] - skipped + np.spacing(1))
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            with np.errstate(invalid="ignore"):
                reached = np.searchsorted(_RECALLS, found / objects, side="right")
            result[:, i] = (np.diff(reached, axis=1, prepend=0) * precision).sum(1) / len(_RECALLS)
        return np.where(objects > 0, result, np.nan)


def _curves(comparison) -> Iterator[_Curve]:
    """The curves of what pycocotools' COCOeval has compared, without those of categories that have no object."""
    num_images, num_areas = len(comparison.params.imgIds), len(comparison.params.areaRng)
    images = comparison.evalImgs  # [categories, areas, images]
    for start in range(0, len(images), num_images):
        compared = [(i, image) for i, image in enumerate(images[start : start + num_images]) if image is not None]
        objects = np.zeros(num_images, np.int64)
        for i, image in compared:
            objects[i] = np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)
        if not objects.any():
            continue
        order = np.argsort(-np.concatenate([image["dtScores"] for _, image in compared]), kind="stable")
        which = np.repeat([i for i, _ in compared], [len(image["dtScores"]) for _, image in compared])[order]
        ignored, matched = (
            np.concatenate([np.asarray(image[key], bool).reshape(10, -1) for _, image in compared], axis=1)[:, order]
            for key in ("dtIgnore", "dtMatches")
        )
        hit = matched & ~ignored
        last = hit.any(0).nonzero()[0].max(initial=-1)
        matters = ~ignored.all(0) & (np.arange(len(order)) <= last)
        yield _Curve(
            area=start // num_images % num_areas,
            images=which[matters],
            hits=[row.nonzero()[0] for row in hit[:, matters]],
            ignored=[row.nonzero()[0] for row in ignored[:, matters]],
            objects=objects,
        )


def _summarise(precision: np.ndarray) -> dict[str, float]:
    figures = {}
    for name, (iou, area) in zip(FIGURES, _PLACES, strict=True):
        values = precision[iou, ..., area]
        values = values[values > -1]
        figures[name] = 100 * float(values.mean()) if values.size else np.nan
    return figures


def _compare_with_truth(annotations: dict, results: list[dict], kind: str, backend: str):
    """A COCOeval that has been run, all but its summary."""
    coco, coco_eval = _library(backend)
    # pycocotools writes into what it is given. With a box beside it, a mask would be small, medium or large by the box.
    dropped = "bbox" if kind == "segm" else "segmentation"
    results = [{key: value for key, value in entry.items() if key != dropped} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = annotations
        truth.createIndex()
        comparison = coco_eval(truth, truth.loadRes(results), kind)
        comparison.params.maxDets = [100]
        comparison.evaluate()
        comparison.accumulate()
    return comparison


def _library(backend: str):
    try:
        if backend == "hotcoco":
            module = import_module("hotcoco")
            return module.COCO, module.COCOeval
        return import_module("pycocotools.coco").COCO, import_module("pycocotools.cocoeval").COCOeval
    except ImportError as error:
        raise UserError(f"{backend} is not installed ({error}): pip install 'dk-detection[evaluation]'") from error
