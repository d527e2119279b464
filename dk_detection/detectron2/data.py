"""Data sets: the one that the project makes, registered; and whether the files of a registered one are there."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

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


def check_data(names: list[str]) -> None:
    """Checks that data sets are registered and, as far as they are local COCO files, there.

    Args:
        names: Of the data sets, as a config has them.

    Raises:
        UserError: One is not.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            raise UserError(f"no data set is registered as {name!r}")
        metadata = MetadataCatalog.get(name)
        advice = "set DETECTRON2_DATASETS to the folder that holds its files"
        if name.startswith("deformed_shapes"):
            root = os.path.dirname(metadata.image_root)
            advice = (
                f"make it with `python -m dk_detection.datasets.deformed_shapes --out {root}`, or set "
                "DK_DEFORMED_SHAPES_ROOT to the folder of the data"
            )
        for kind, path in (
            ("annotation file", metadata.get("json_file")),
            ("image folder", metadata.get("image_root")),
        ):
            if path and "://" not in path and not os.path.exists(path):
                raise UserError(f"{name}: there is no {kind} {path}; {advice}")
