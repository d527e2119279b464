"""Looks at the files of COCO and PASCAL VOC that a config names before a run starts: a slip costs seconds, no epoch."""

import os
from collections.abc import Iterator

from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config

from dk_detection.datasets.coco_check import SAMPLE, CocoFile, check_labels
from dk_detection.datasets.voc_check import check_voc
from dk_detection.errors import UserError
from dk_detection.mmengine.data_checks import advice, check_heads, class_of, datasets_of, evaluators_of, is_local


def check_data(cfg: Config, modes: tuple[str, ...]) -> dict[str, dict]:
    """Checks all local files of COCO's and PASCAL VOC's kind, and says how much will be learned from and judged.

    Data sets and metrics derived from MMDetection's that read files in a way of their own are left alone.

    Args:
        cfg: A config of MMDetection.
        modes: The data loaders and evaluators to look at, of "train", "val" and "test".

    Returns:
        The content of COCO's files by real path, for `coco_check.handed_on`.

    Raises:
        UserError: A file is missing or broken, or things that belong together do not fit.
    """
    files: dict[str, CocoFile] = {}

    def load(where: str, path: str, how_to_get: str = "") -> CocoFile:
        key = os.path.realpath(path)
        if key not in files:
            try:
                files[key] = CocoFile.read(path)
            except FileNotFoundError:
                raise UserError(f"{where}: there is no annotation file {path}{how_to_get}") from None
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: the annotation file {path} is broken: {error}") from error
        return files[key]

    for mode in modes:
        evaluators = list(_coco_evaluators(cfg, mode))
        labelled = mode != "test" or any(not evaluator.get("format_only") for _, evaluator in evaluators)
        classes, images, local = None, set(), True
        for where, dataset in datasets_of(cfg, mode):
            kind = class_of(dataset, DATASETS)
            if _reads_as(kind, XMLDataset, "load_data_list", "parse_data_info") and is_local(where, dataset):
                _check_voc(cfg, where, dataset)
            if not _reads_as(kind, CocoDataset, "load_data_list", "parse_data_info"):
                continue
            if not is_local(where, dataset):
                local = False
                continue
            how_to_get = advice(cfg, dataset)
            path = _path(where, dataset, "ann_file")
            file = load(where, path, how_to_get)
            classes = _classes(where, dataset)
            check_heads(cfg, where, len(classes))
            _check_dataset(where, path, file, dataset, classes, mode, labelled, how_to_get)
            images |= {image["id"] for image in file.images}
        for where, evaluator in evaluators:
            if not evaluator.get("ann_file") or not is_local(where, evaluator):
                continue
            path = _path(where, evaluator, "ann_file")
            file = load(where, path)
            if evaluator.get("format_only"):
                continue
            if not file.has_annotations:
                raise UserError(f"{where}: the annotation file {path} has no 'annotations' to compare with")
            if local and (missing := images - {image["id"] for image in file.images}):
                raise UserError(
                    f"{where}: the annotation file {path} lacks images of {mode}_dataloader, such as the one with id "
                    f"{min(missing)}; both have to name the same file"
                )
            try:
                if classes:
                    check_labels(file.labels(classes), classes, "the config")
                tally = file.judged(classes, masks="segm" in evaluator.get("metric", "bbox"))
            except ValueError as error:
                raise UserError(f"{where}: the annotation file {path} is broken: {error}") from error
            if tally.is_vain():
                raise UserError(f"{where}: there is nothing to compare with in the annotation file {path}: {tally}")
            print(f"{path}: judged: {tally}", flush=True)
    return {path: file.content for path, file in files.items()}


def _check_voc(cfg: Config, where: str, dataset: dict) -> None:
    path, classes = _path(where, dataset, "ann_file"), _classes(where, dataset)
    check_heads(cfg, where, len(classes))
    root = _path(where, dataset, "data_prefix", "sub_data_root")
    folders = (dataset.get("img_subdir", "JPEGImages"), dataset.get("ann_subdir", "Annotations"))
    try:
        line = check_voc(path, *(os.path.join(root, folder) for folder in folders), classes)
    except ValueError as error:
        raise UserError(f"{where}: {error}{advice(cfg, dataset)}") from error
    print(f"{path}: {line}", flush=True)


def _check_dataset(where, path, file, dataset, classes, mode, labelled, how_to_get) -> None:
    if labelled and not file.has_annotations:
        raise UserError(f"{where}: the annotation file {path} has no 'annotations'")
    if mode == "train" and not file.annotations:
        raise UserError(f"{where}: the annotation file {path} has no annotations, there is nothing to learn from")
    if missing := [name for name in classes if name not in file.names]:
        raise UserError(
            f"{where}: the annotation file {path} has no category {missing[0]!r} ({len(missing)} of {len(classes)} "
            f"classes are missing; it has {', '.join(sorted(file.names)[:8])}); set metainfo=dict(classes=...) to "
            "its categories"
        )
    loads_masks = [step for step in dataset.get("pipeline") or () if step.get("with_mask")]
    filters = dataset.get("filter_cfg") or {}
    try:
        check_labels(file.labels(classes), classes, "the config")
        tally = file.learned_by_mmdet(
            classes,
            masks=bool(loads_masks),
            min_size=filters.get("min_size", 0) if mode == "train" else 0,
            rle=all(step.get("poly2mask", True) for step in loads_masks),
        )
    except ValueError as error:
        raise UserError(f"{where}: the annotation file {path} is broken: {error}") from error
    needed = None
    if mode == "train":
        if tally.is_vain():
            raise UserError(f"{where}: there is nothing to learn from in the annotation file {path}: {tally}")
        print(f"{path}: learned from: {tally}{file.without(tally.kept, classes)}", flush=True)
        if filters.get("filter_empty_gt"):
            needed = file.images_of(file.known(classes).kept)
    folder = _path(where, dataset, "data_prefix", "img")
    if not os.path.isdir(folder or "."):
        raise UserError(f"{where}: there is no image folder {folder}{how_to_get}")
    try:
        file.check_pictures(folder, needed, SAMPLE)
    except ValueError as error:
        raise UserError(f"{where}: {error}; {path} names it") from error


def _classes(where: str, dataset: dict) -> tuple[str, ...]:
    classes = class_of(dataset, DATASETS)._load_metainfo(dataset.get("metainfo"))["classes"]
    if isinstance(classes, str):
        raise UserError(
            f"{where}: metainfo.classes is the text {classes!r}, expected a list; of one class it is ({classes!r},), "
            "with a comma"
        )
    return tuple(classes)


def _coco_evaluators(cfg: Config, mode: str) -> Iterator[tuple[str, dict]]:
    """The COCO evaluators of a mode with their places in the config."""
    evaluators = evaluators_of(cfg, mode)
    for i, evaluator in enumerate(evaluators):
        if _reads_as(class_of(evaluator, METRICS), CocoMetric, "compute_metrics"):
            yield f"{mode}_evaluator[{i}]" if len(evaluators) > 1 else f"{mode}_evaluator", evaluator


def _reads_as(kind: type, base: type, *methods: str) -> bool:
    """Whether a class has inherited some methods of a base unchanged."""
    return issubclass(kind, base) and all(getattr(kind, name) is getattr(base, name) for name in methods)


def _path(where: str, settings: dict, *keys: str) -> str:
    """The path at some keys of a data set or an evaluator, with its root."""
    path = settings
    for key in keys:
        if not isinstance(path, dict):
            raise UserError(f"{where}: {keys[0]} is {path!r}, expected dict({key}=...)")
        if key not in path:
            raise UserError(f"{where} sets no {'.'.join(keys)}")
        path = path[key]
    if not isinstance(path, str):
        raise UserError(f"{where}: {'.'.join(keys)} is {path!r}, expected one path")
    return os.path.join(settings.get("data_root") or "", path)
