"""Data sets: the one that the project makes, registered; and whether the files of a registered one are in order."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from dk_detection.datasets.coco_check import SAMPLE, CocoFile, check_labels
from dk_detection.datasets.voc_check import check_voc
from dk_detection.errors import UserError

_SPLITS = ("train", "val")


def register() -> None:
    """Registers deformed_shapes_train and deformed_shapes_val. DK_DEFORMED_SHAPES_ROOT says where they lie.

    May be called again.
    """
    root = os.environ.get("DK_DEFORMED_SHAPES_ROOT", "data/deformed_shapes")
    for split in _SPLITS:
        name = f"deformed_shapes_{split}"
        if name not in DatasetCatalog.list():
            annotations = os.path.join(root, "annotations", f"instances_{split}.json")
            register_coco_instances(name, {}, annotations, os.path.join(root, split))


def check_data(
    train: list[str],
    test: list[str],
    *,
    masks: bool,
    rle: bool = False,
    filter_empty: bool = True,
    num_classes: dict[str, int] | None = None,
) -> dict[str, dict]:
    """Checks that data sets are registered and, as far as they are local files of COCO's or PASCAL VOC's
    kind, there and in order.

    Says how many of their objects will be learned from and judged.

    Args:
        train: Names of the data sets to learn from.
        test: Of those to evaluate on.
        masks: Whether masks are learned.
        rle: Whether masks may be run-length encoded.
        filter_empty: Whether pictures without objects are left out of training.
        num_classes: How many classes heads of the detector have, by their places in the config.

    Returns:
        The content of COCO's files that are read at once, by real path, for `coco_check.handed_on`.

    Raises:
        UserError: One of them is not.
    """
    contents, first = {}, None
    for name in dict.fromkeys([*train, *test]):
        if name not in DatasetCatalog.list():
            raise UserError(f"no data set is registered as {name!r}")
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") == "pascal_voc" and "://" not in metadata.get("dirname", "://"):
            _check_voc(name, metadata, num_classes or {})
            continue
        path, folder = metadata.get("json_file"), metadata.get("image_root")
        for kind, value in (("annotation file", path), ("image folder", folder)):
            if value and "://" not in value and not os.path.exists(value):
                raise UserError(f"{name}: there is no {kind} {value}; {_advice(name, metadata)}")
        if metadata.get("evaluator_type") != "coco" or not path or not folder or "://" in path + folder:
            continue
        try:
            file = CocoFile.read(path)
            labels = file.labels(by_id=True)
            first = first or (name, labels)
            check_labels(labels, metadata.get("thing_classes", labels), "Detectron2's catalogue")
            check_labels(labels, first[1], first[0])
            lines = _check_objects(file, name in train, name in test, masks, rle)
            needed = None
            if name in train and filter_empty:
                needed = file.images_of(file.learned_by_detectron2(masks=False).kept)
            file.check_pictures(folder, None if name in test else needed, SAMPLE)
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: the annotation file {path} is broken: {error}") from error
        for line in lines:
            print(f"{path}: {line}", flush=True)
        _check_classes(name, len(labels), num_classes or {})
        if name in train or not train:
            contents[os.path.realpath(path)] = file.content
    return contents


def _check_voc(name: str, metadata, num_classes: dict[str, int]) -> None:
    folder, classes = metadata.dirname, metadata.thing_classes
    path = os.path.join(folder, "ImageSets", "Main", f"{metadata.split}.txt")
    try:
        line = check_voc(path, os.path.join(folder, "JPEGImages"), os.path.join(folder, "Annotations"), classes)
    except ValueError as error:
        raise UserError(f"{name}: {error}; {_advice(name, metadata)}") from error
    print(f"{path}: {line}", flush=True)
    _check_classes(name, len(classes), num_classes)


def _check_classes(name: str, number: int, num_classes: dict[str, int]) -> None:
    for place, wanted in num_classes.items():
        if wanted != number:
            raise UserError(f"{place} is {wanted}, and {name} has {number} classes")


def _check_objects(file: CocoFile, learned: bool, judged: bool, masks: bool, rle: bool) -> list[str]:
    """How many objects of a file serve, in words."""
    if not file.has_annotations and not learned:
        return []  # as of COCO's test-dev
    lines = []
    tally = file.learned_by_detectron2(masks=masks and learned, rle=rle)  # all files are read so
    if learned:
        if not tally.kept.any():
            raise ValueError(f"there is nothing to learn from: {tally}")
        lines.append(f"learned from: {tally}{file.without(tally.kept)}")
    if judged:
        tally = file.judged(masks=masks)
        if tally.is_vain():
            raise ValueError(f"there is nothing to compare with: {tally}")
        lines.append(f"judged: {tally}")
    return lines


def _advice(name: str, metadata) -> str:
    """How to get the data."""
    if not name.startswith("deformed_shapes"):
        return "set DETECTRON2_DATASETS to the folder that holds its files"
    root = os.path.dirname(metadata.image_root)
    return (
        f"make it with `python -m dk_detection.datasets.deformed_shapes --out {root}`, or set DK_DEFORMED_SHAPES_ROOT "
        "to the folder of the data"
    )
