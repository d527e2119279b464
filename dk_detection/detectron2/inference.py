"""Inference over many images whose results are kept on disk as they come, so that it can be killed and go on.

Detectron2's `inference_on_dataset` does it, with the config's own mapper, its launcher, progress and time left. Only
the list of images and the evaluator are ours: one leaves out what is finished, the other keeps no result in memory.
There is one image in a batch, as in COCO's configs: then a result does not depend on which other images are in it, and
an inference that was resumed gives the same bytes as one that was not.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data.transforms import AugmentationList
from detectron2.engine import launch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import OmegaConf
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from dk_detection.config_files import is_lazy_config
from dk_detection.detectron2.train import _join_torchrun, _LazyJob, _YamlJob
from dk_detection.detectron2.tta import tta_of_lazy_config, tta_of_yaml
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
    arguments = (config, checkpoint, images, image_folder, folder, tta, list(options))
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join_torchrun()
        return _main(*arguments)
    try:
        launch(_main, num_gpus, dist_url="auto", args=arguments)
    except ProcessRaisedException as error:  # of several processes; it holds the text of the first one's traceback
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
        if not kind.endswith(UserError.__name__):
            raise
        raise UserError(message) from None


def test_set(config: str, options: Sequence[str] = ()) -> tuple[str, str]:
    """The annotation file and the image folder of a config's test set.

    Raises:
        UserError: The config cannot be loaded, or its test set is not one of COCO's kind.
    """
    names = _job(config, options).data()["test"]
    metadata = MetadataCatalog.get(names[0]) if len(names) == 1 and names[0] in DatasetCatalog.list() else None
    if not metadata or not metadata.get("json_file"):
        raise UserError(f"{config}: its test set is not one of COCO's kind, got {', '.join(names)}")
    return metadata.json_file, metadata.image_root


def _job(config: str, options: Sequence[str]) -> _YamlJob | _LazyJob:
    job = (_LazyJob if is_lazy_config(config) else _YamlJob)(config, list(options))
    if job.device.startswith("cuda") and not torch.cuda.is_available():
        job.device = "cpu"
    return job


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
    job = _job(config, options)
    cfg = job.cfg
    if isinstance(job, _LazyJob):
        model, mapper = instantiate(cfg.model).to(job.device), instantiate(cfg.dataloader.test.mapper)
        settings = cfg.get("tta") or OmegaConf.create()
        augmented, identity = tta_of_lazy_config, (cfg.model, cfg.dataloader.test.mapper, tta and settings)
        num_workers = cfg.dataloader.test.get("num_workers", 0)
    else:
        model, mapper = build_model(cfg), DatasetMapper(cfg, is_train=False)
        settings, augmented, identity = cfg, tta_of_yaml, (cfg.MODEL, cfg.INPUT, cfg.TEST, tta)
        num_workers = cfg.DATALOADER.NUM_WORKERS
    _check_categories(model, job.data()["test"], images)
    if not os.path.isfile(checkpoint):
        raise UserError(f"{checkpoint}: there is no such checkpoint")
    shards.claim(
        folder,
        config=re.sub(" at 0x[0-9a-f]+", "", str(identity)).encode(),
        checkpoint=Path(checkpoint).read_bytes(),
        images=repr(list(images.images)).encode(),
    )
    setup_logger(folder, distributed_rank=comm.get_rank())
    _Checkpointer(model).load(checkpoint)
    if tta:
        mapper.augmentations = AugmentationList([])  # the views are made of the image as it is
        model = augmented(settings, model)

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
        loader = build_detection_test_loader(unfinished, mapper=mapper, num_workers=num_workers)
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


class _Checkpointer(DetectionCheckpointer):
    """Refuses to leave a weight as it was; Detectron2 warns, and the figures look like a bad result."""

    def _log_incompatible_keys(self, incompatible) -> None:
        super()._log_incompatible_keys(incompatible)
        wrong = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        wrong = [key for key in wrong if not key.startswith("mimic.")]  # without effect on predictions
        if wrong:
            raise UserError(
                f"the checkpoint does not fit the model of this config: {len(wrong)} weights are missing or have "
                f"another shape, such as {wrong[0]}"
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
