"""Looks at the data that a config names before a run starts, so that a slip costs seconds and not an epoch."""

import inspect
import os
import re
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, MODELS, Registry

from dk_detection.config_files import parameters_of
from dk_detection.datasets import deformed_shapes
from dk_detection.errors import UserError

# Heads with an output for each class, in detectors, classifiers and segmentors. A proposal network has none of those,
# whatever its num_classes is.
_HEADS = ("bbox_head", "mask_head", "head", "decode_head", "auxiliary_head")


def check_data(cfg: Config, modes: tuple[str, ...]) -> dict[str, dict]:
    """Checks that the local data sets of a config are there, and that the heads have as many classes as they.

    Args:
        cfg: A config, under its default scope.
        modes: The data loaders to look at, of "train", "val" and "test".

    Returns:
        An empty dictionary: no file is read, so that none need be read again.

    Raises:
        UserError: Something is missing, or things that belong together do not fit.
    """
    for mode in modes:
        for where, settings in datasets_of(cfg, mode):
            if not issubclass(class_of(settings, DATASETS), BaseDataset) or not is_local(where, settings):
                continue
            how_to_get = advice(cfg, settings)
            if not os.path.isdir(settings.get("data_root") or "."):
                raise UserError(f"{where}: there is no folder {settings['data_root']}{how_to_get}")
            try:
                dataset = DATASETS.build(settings | {"lazy_init": True})  # which settles paths and classes
            except Exception as error:
                listed = os.path.join(settings.get("data_root") or "", settings.get("ann_file") or "")
                if settings.get("ann_file") and not os.path.isfile(listed):  # of which some data sets give no reason
                    raise UserError(f"{where}: there is no annotation file {listed}{how_to_get}") from error
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"{where}: the data set cannot be built ({type(error).__name__}: {reason})") from error
            if dataset.ann_file and not os.path.isfile(dataset.ann_file):
                raise UserError(f"{where}: there is no annotation file {dataset.ann_file}{how_to_get}")
            for folder in dataset.data_prefix.values():
                if isinstance(folder, str) and folder and not os.path.exists(folder):
                    raise UserError(f"{where}: there is no folder {folder}{how_to_get}")
            classes = dataset.metainfo.get("classes")
            folders = _class_folders(dataset)
            if classes and folders and len(folders) != len(classes):
                raise UserError(
                    f"{where}: {dataset.img_prefix} has {len(folders)} folders, expected one for each of the "
                    f"{len(classes)} classes{how_to_get}"
                )
            if classes or folders:
                check_heads(cfg, where, len(classes or folders))
    return {}


def _class_folders(dataset: BaseDataset) -> list[str]:
    """The folders of a data set of MMPretrain's that has one for each class, as ImageNet."""
    if dataset.ann_file or not getattr(dataset, "with_label", False) or not hasattr(dataset, "_find_samples"):
        return []
    with os.scandir(dataset.img_prefix) as entries:
        return [entry.name for entry in entries if entry.is_dir()]


def check_heads(cfg: Config, where: str, number: int) -> None:
    """Checks that heads with an output for each class have as many as a data set.

    Args:
        cfg: The config.
        where: The place of the data set in it.
        number: Its number of classes.

    Raises:
        UserError: One has another number.
    """
    todo = [("model", cfg.get("model") or {}, False)]
    while todo:
        place, value, is_head = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{place}.{key}", inner, key in _HEADS) for key, inner in value.items()]
            default = getattr(parameters_of(class_of(value, MODELS))[0].get("num_classes"), "default", None)
            wanted = value.get("num_classes", default)
            if is_head and isinstance(wanted, int) and wanted != number:
                raise UserError(f"{place}.num_classes is {wanted}, and {where} has {number} classes")
        elif isinstance(value, (list, tuple)):
            todo += [(f"{place}[{i}]", inner, is_head) for i, inner in enumerate(value)]


def datasets_of(cfg: Config, mode: str) -> Iterator[tuple[str, dict]]:
    """The data sets of a data loader, inside of all wrappers, with their places in the config."""
    loader = cfg.get(f"{mode}_dataloader")
    todo = [(f"{mode}_dataloader.dataset", loader["dataset"])] if loader else []
    while todo:
        where, dataset = todo.pop(0)
        if "dataset" in dataset:
            todo.append((f"{where}.dataset", dataset["dataset"]))
        elif "datasets" in dataset:
            todo += [(f"{where}.datasets[{i}]", inner) for i, inner in enumerate(dataset["datasets"])]
        else:
            yield where, dataset


def evaluators_of(cfg: Config, mode: str) -> list[dict]:
    """The settings of all evaluators of a mode."""
    evaluators = cfg.get(f"{mode}_evaluator") or []
    return [evaluators] if isinstance(evaluators, dict) else evaluators


def class_of(settings: dict, registry: Registry) -> type:
    """The class that a `type` means under the default scope; `object` if there is none, which the framework will tell.

    Args:
        settings: A part of a config.
        registry: Where the class is looked up if there is no default scope.
    """
    kind = settings.get("type")
    if isinstance(kind, str):
        with registry.switch_scope_and_registry(settings.get("_scope_")) as own:
            kind = own.get(kind)
    return kind if inspect.isclass(kind) else object


def is_local(where: str, settings: dict) -> bool:
    """Whether the files of a data set or an evaluator are on this machine.

    Raises:
        UserError: A path is none.
    """
    paths = [settings.get("data_root") or "", settings.get("ann_file") or ""]
    for key, path in zip(("data_root", "ann_file"), paths, strict=True):
        if not isinstance(path, str):
            raise UserError(
                f"{where}: {key} is {path!r}, expected one path; several data sets are one as "
                "dict(type='ConcatDataset', datasets=[...])"
            )
    return not settings.get("backend_args") and not any("://" in path for path in paths)


def advice(cfg: Config, dataset: dict) -> str:
    """How to get the data, where that is known; begins with what it is joined to."""
    ways = []
    classes = set((dataset.get("metainfo") or {}).get("classes", ()))
    if classes - {"background"} == set(deformed_shapes.CLASSES):
        task = "" if dataset.get("ann_file") else " --task classification"
        if "background" in classes:
            task = " --task segmentation"
        ways.append(
            f"make it with `python -m dk_detection.datasets.deformed_shapes{task} --out {dataset['data_root']}`"
        )
    variables = sorted(set(re.findall(r"\{\{\s*\$(\w+)\s*:", cfg.text)))
    if variables:
        ways.append(f"set {' or '.join(variables)} to the folder of the data")
    return f"; {', or '.join(ways)}" if ways else ""
