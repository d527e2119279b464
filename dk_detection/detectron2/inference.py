"""Inference over many images whose results are kept on disk as they come, so that it can be killed and go on.

Detectron2's `inference_on_dataset` does it, with the config's own mapper, its launcher, progress and time left. Only
the list of images and the evaluator are ours: one leaves out what is finished, the other keeps no result in memory.
There is one image in a batch, as in COCO's configs: then a result does not depend on which other images are in it, and
an inference that was resumed gives the same bytes as one that was not.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.transforms import AugmentationList
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from dk_detection.detectron2.jobs import load_job, load_weights, reading, start
from dk_detection.errors import UserError, catch_sigterm
from dk_detection.evaluation import shards
from dk_detection.evaluation.results import ImageSet


def run(
    config: str,
    checkpoint: str,
    images: ImageSet,
    image_folder: str,
    folder: str,
    *,
    tta: bool = False,
    options: Sequence[str] = (),
    num_gpus: int = 1,
) -> None:
    """Detects objects on all images of a set that have no results yet.

    Under torchrun this process is one of many already; otherwise those asked for are started.

    Args:
        config: A config file of Detectron2, YAML or LazyConfig.
        checkpoint: The weights.
        images: The set; its categories give the results their ids.
        image_folder: Where its images are.
        folder: Where the results are kept, see `dk_detection.evaluation.shards`.
        tta: On several views of each image, those of TEST.AUG (YAML) or of `tta` (LazyConfig).
        options: Settings that override the config's, KEY VALUE ... (YAML) or key=value ... (LazyConfig).
        num_gpus: Processes on this machine, each with a GPU if there are any.

    Raises:
        UserError: Something that the user can put right.
    """
    images.check_files(image_folder)
    start(_main, (config, checkpoint, images, image_folder, folder, tta, list(options)), num_gpus, url="auto")


def test_set(config: str, options: Sequence[str] = ()) -> tuple[str, str]:
    """The annotation file and the image folder of a config's test set.

    Raises:
        UserError: The config cannot be loaded, or its test set is not one of COCO's kind.
    """
    names = load_job(config, options).data()["test"]
    metadata = MetadataCatalog.get(names[0]) if len(names) == 1 and names[0] in DatasetCatalog.list() else None
    if not metadata or not metadata.get("json_file"):
        raise UserError(f"{config}: its test set is not one of COCO's kind, got {', '.join(names)}")
    return metadata.json_file, metadata.image_root


def _main(
    config: str,
    checkpoint: str,
    images: ImageSet,
    image_folder: str,
    folder: str,
    tta: bool,
    options: list[str],
) -> None:
    catch_sigterm()  # in a process that `launch` started nobody else has
    job = load_job(config, options).prepare()
    model, mapper = job.build_model(job.device), job.mapper()
    _check_categories(model, job.data()["test"], images)
    with reading(checkpoint):
        weights = Path(checkpoint).read_bytes()
    shards.claim(
        folder,
        config=repr((job.predicting(tta), tta)).encode(),
        checkpoint=weights,
        images=repr(list(images.images)).encode(),
    )
    setup_logger(folder, distributed_rank=comm.get_rank())
    load_weights(model, checkpoint)
    if tta:
        mapper.augmentations = AugmentationList([])  # the views are made of the image as it is
        model = job.augmented(model)

    finished = shards.finished(folder)
    unfinished = [
        dict(
            file_name=os.path.join(image_folder, image["file_name"]),
            image_id=image["id"],
            height=image["height"],
            width=image["width"],
        )
        for image in images.content["images"]
        if image["id"] not in finished
    ]
    comm.synchronize()  # nobody adds a result before all have looked
    if unfinished:
        loader = build_detection_test_loader(unfinished, mapper=mapper, num_workers=job.num_workers)
        inference_on_dataset(model, loader, ResultShards(folder, sorted(images.categories)))


def _check_categories(model: nn.Module, data_sets: list[str], images: ImageSet) -> None:
    """Detectron2 numbers categories in the order of their ids; a set of images has to have those of the model."""
    names = [images.categories[i] for i in sorted(images.categories)]
    number = getattr(getattr(model, "roi_heads", model), "num_classes", len(names))
    if number != len(names):
        raise UserError(f"{images.path}: it has {len(names)} categories, the config's detector {number}")
    for name in data_sets:
        with suppress(FileNotFoundError):
            DatasetCatalog.get(name)  # whereupon the names of its categories are known
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes and classes != names:
            first = next(i for i in range(number) if classes[i : i + 1] != names[i : i + 1])
            raise UserError(
                f"{images.path}: its categories are not those of {name} in the same order; number {first} is "
                f"{names[first]!r} here and {classes[first]!r} there"
            )


class ResultShards(DatasetEvaluator):
    """Writes results to disk instead of evaluating them.

    Args:
        folder: Where they are kept.
        category_ids: The category id of each label.
    """

    def __init__(self, folder: str, category_ids: list[int]) -> None:
        self._writer = shards.Writer(folder, comm.get_rank())
        self._category_ids = category_ids

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            detections = instances_to_coco_json(output["instances"].to("cpu"), given["image_id"])
            for detection in detections:
                del detection["image_id"]
                detection["category_id"] = self._category_ids[detection["category_id"]]
            self._writer.write(given["image_id"], detections)

    def evaluate(self) -> dict:
        self._writer.close()
        comm.synchronize()  # whoever reads the results finds those of all processes
        return {}
