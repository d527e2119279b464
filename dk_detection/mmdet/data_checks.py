"""Looks at the COCO files that a config names before a run starts, so that a slip costs seconds and not an epoch."""

import inspect
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config

from dk_detection.datasets import deformed_shapes
from dk_detection.errors import UserError

_IMAGE_KEYS = ("id", "file_name", "width", "height")
_ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox", "area")
_CATEGORY_KEYS = ("id", "name")


@dataclass(frozen=True)
class AnnotationFile:
    """What the checks need to know of one file.

    Attributes:
        images: File names by image id.
        categories: Names.
        num_annotations: None where the file has no annotations by intention, as COCO's image_info files.
        without_mask: Index of the first annotation without a segmentation.
    """

    images: dict[int, str]
    categories: set[str]
    num_annotations: int | None
    without_mask: int | None


def check_data(cfg: Config, modes: tuple[str, ...]) -> None:
    """Checks all local COCO files of a config.

    Args:
        cfg: A config of MMDetection.
        modes: The data loaders and evaluators to look at, of "train", "val" and "test".

    Raises:
        UserError: A file is missing or broken, or two that belong together do not fit.
    """
    files: dict[str, AnnotationFile] = {}

    def load(where: str, path: str, advice: str = "") -> AnnotationFile:
        if path not in files:
            try:
                files[path] = read_annotation_file(path)
            except FileNotFoundError:
                raise UserError(f"{where}: there is no annotation file {path}{advice}") from None
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: the annotation file {path} is broken: {error}") from error
        return files[path]

    for mode in modes:
        evaluators = list(_coco_evaluators(cfg, mode))
        labelled = mode != "test" or any(not evaluator.get("format_only") for _, evaluator in evaluators)
        images, local = set(), True
        for where, dataset in _datasets(cfg, mode):
            if not _is_local(dataset):
                local = False
                continue
            advice = _advice(cfg, dataset)
            path = _join(dataset, dataset.get("ann_file", ""))
            file = load(where, path, advice)
            _check_dataset(where, path, file, dataset, mode, labelled, advice)
            images |= file.images.keys()
        for where, evaluator in evaluators:
            path = evaluator.get("ann_file")
            if not path or not _is_local(evaluator):
                continue
            file = load(where, path)
            if not evaluator.get("format_only") and file.num_annotations is None:
                raise UserError(f"{where}: the annotation file {path} has no 'annotations' to compare with")
            if local and images - file.images.keys():
                raise UserError(
                    f"{where}: the annotation file {path} lacks images of {mode}_dataloader, such as the one with id "
                    f"{min(images - file.images.keys())}; both have to name the same file"
                )


def read_annotation_file(path: str) -> AnnotationFile:
    """Reads a COCO annotation file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not what it should be; the message says where.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object with images and categories")
    for section, keys in (("images", _IMAGE_KEYS), ("categories", _CATEGORY_KEYS), ("annotations", _ANNOTATION_KEYS)):
        if section not in content and section == "annotations":
            continue
        entries = content.get(section)
        if not isinstance(entries, list):
            raise ValueError(f"it has no list '{section}'")
        if not entries and section != "annotations":
            raise ValueError(f"its list '{section}' is empty")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f"{section}[{i}] is {entry!r}, expected an object")
            if missing := [key for key in keys if key not in entry]:
                raise ValueError(f"{section}[{i}] has no '{missing[0]}'")
        if len({entry["id"] for entry in entries}) != len(entries):
            raise ValueError(f"the ids in '{section}' are not unique")
    annotations = content.get("annotations")
    for i, annotation in enumerate(annotations or ()):
        if not isinstance(annotation["bbox"], list) or len(annotation["bbox"]) != 4:
            raise ValueError(f"annotations[{i}]: bbox is {annotation['bbox']}, expected [x, y, width, height]")
    return AnnotationFile(
        images={image["id"]: image["file_name"] for image in content["images"]},
        categories={category["name"] for category in content["categories"]},
        num_annotations=None if annotations is None else len(annotations),
        without_mask=next((i for i, a in enumerate(annotations or ()) if not a.get("segmentation")), None),
    )


def _check_dataset(where, path, file, dataset, mode, labelled, advice) -> None:
    if labelled and file.num_annotations is None:
        raise UserError(f"{where}: the annotation file {path} has no 'annotations'")
    if mode == "train" and not file.num_annotations:
        raise UserError(f"{where}: the annotation file {path} has no annotations, there is nothing to learn from")
    wants_masks = any(step.get("with_mask") for step in dataset.get("pipeline") or ())
    if wants_masks and file.without_mask is not None:
        raise UserError(
            f"{where}: annotations[{file.without_mask}] of {path} has no 'segmentation', but the pipeline loads masks"
        )
    classes = class_of(dataset, DATASETS)._load_metainfo(dataset.get("metainfo"))["classes"]
    if missing := [name for name in classes if name not in file.categories]:
        raise UserError(
            f"{where}: the annotation file {path} has no category {missing[0]!r} ({len(missing)} of {len(classes)} "
            f"classes are missing; it has {', '.join(sorted(file.categories)[:8])}); set metainfo=dict(classes=...) to "
            "its categories"
        )
    folder = _join(dataset, dataset.get("data_prefix", {}).get("img", ""))
    if not os.path.isdir(folder or "."):
        raise UserError(f"{where}: there is no image folder {folder}{advice}")
    image = os.path.join(folder, next(iter(file.images.values())))
    if not os.path.isfile(image):
        raise UserError(f"{where}: there is no image {image}, the first that {path} names")


def _datasets(cfg: Config, mode: str) -> Iterator[tuple[str, dict]]:
    """The COCO data sets of a data loader, inside of all wrappers, with their places in the config."""
    loader = cfg.get(f"{mode}_dataloader")
    todo = [(f"{mode}_dataloader.dataset", loader["dataset"])] if loader else []
    while todo:
        where, dataset = todo.pop(0)
        if "dataset" in dataset:
            todo.append((f"{where}.dataset", dataset["dataset"]))
        elif "datasets" in dataset:
            todo += [(f"{where}.datasets[{i}]", inner) for i, inner in enumerate(dataset["datasets"])]
        elif issubclass(class_of(dataset, DATASETS), CocoDataset):
            yield where, dataset


def _coco_evaluators(cfg: Config, mode: str) -> Iterator[tuple[str, dict]]:
    """The COCO evaluators of a mode with their places in the config."""
    evaluators = evaluators_of(cfg, mode)
    for i, evaluator in enumerate(evaluators):
        if issubclass(class_of(evaluator, METRICS), CocoMetric):
            yield f"{mode}_evaluator[{i}]" if len(evaluators) > 1 else f"{mode}_evaluator", evaluator


def evaluators_of(cfg: Config, mode: str) -> list[dict]:
    """The settings of all evaluators of a mode."""
    evaluators = cfg.get(f"{mode}_evaluator") or []
    return [evaluators] if isinstance(evaluators, dict) else evaluators


def class_of(settings: dict, registry) -> type:
    """The class that a `type` means; `object` if nothing of that name is registered, which the framework will tell."""
    kind = settings.get("type")
    kind = kind if inspect.isclass(kind) else registry.get(kind)
    return kind if inspect.isclass(kind) else object


def _is_local(settings: dict) -> bool:
    paths = (settings.get("data_root") or "", settings.get("ann_file") or "")
    return not settings.get("backend_args") and not any("://" in path for path in paths)


def _join(dataset: dict, path: str) -> str:
    return os.path.join(dataset.get("data_root") or "", path)


def _advice(cfg: Config, dataset: dict) -> str:
    """How to get the data, where that is known; begins with what it is joined to."""
    ways = []
    if tuple((dataset.get("metainfo") or {}).get("classes", ())) == deformed_shapes.CLASSES:
        ways.append(f"make it with `python -m dk_detection.datasets.deformed_shapes --out {dataset['data_root']}`")
    variables = sorted(set(re.findall(r"\{\{\s*\$(\w+)\s*:", cfg.text)))
    if variables:
        ways.append(f"set {' or '.join(variables)} to the folder of the data")
    return f"; {', or '.join(ways)}" if ways else ""
