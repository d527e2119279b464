"""Inference over many images whose results are kept on disk as they come, so that it can be killed and go on.

The framework's Runner does it, with its own test pipeline, launchers, progress and time left. Only the sampler and the
evaluator are ours: one leaves out what is finished, the other keeps no result in memory. There is one image in a batch,
as in COCO's configs: then a result does not depend on which other images are in it, and an inference that was resumed
gives the same bytes as one that was not.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.registry import DATA_SAMPLERS, DATASETS, METRICS
from mmdet.structures.mask import encode_mask_results
from mmengine.config import Config, ConfigDict
from mmengine.dist import barrier, get_dist_info, get_rank
from mmengine.evaluator import BaseMetric
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.utils.data import Sampler

from dk_detection.convert import translate_names
from dk_detection.errors import UserError
from dk_detection.evaluation import shards
from dk_detection.evaluation.results import ImageSet
from dk_detection.mmengine.checkpoints import check_fits, read_checkpoint
from dk_detection.mmengine.data_checks import class_of
from dk_detection.mmengine.options import load_config
from dk_detection.mmengine.train import join_without_gpu, set_launcher


def run(
    config: str,
    checkpoint: str,
    images: ImageSet,
    image_folder: str,
    folder: str,
    *,
    tta: bool = False,
    options: Sequence[str] = (),
    launcher: str | None = None,
) -> None:
    """Detects objects on all images of a set that have no results yet.

    Args:
        config: A config file of MMDetection.
        checkpoint: The weights.
        images: The set; its categories give the results their ids.
        image_folder: Where its images are.
        folder: Where the results are kept, see `dk_detection.evaluation.shards`.
        tta: With the config's `tta_model` and `tta_pipeline`.
        options: Settings that override the config's, "model.test_cfg.rcnn.score_thr=0.001".
        launcher: "pytorch", "slurm" or "mpi", which has started this process as one of several, or "none". None: found
            out of pytorch's and none.

    Raises:
        UserError: Something that the user can put right.
    """
    cfg = load_config(config, list(options))
    set_launcher(cfg, launcher)
    if missing := [key for key in ("tta_model", "tta_pipeline") if tta and not cfg.get(key)]:
        raise UserError(f"--tta: {config} sets no {missing[0]}; _base_/multi_scale_testing.py has both")
    weights = read_checkpoint(checkpoint)
    images.check_files(image_folder)
    dataset = _dataset(cfg, config)
    category_ids = _category_ids(dataset, images)
    dataset.update(
        data_root="",
        ann_file=os.path.abspath(images.path),
        data_prefix=dict(img=os.path.abspath(image_folder)),
        test_mode=True,
        pipeline=cfg.tta_pipeline if tta else dataset.pipeline,
    )
    if tta:
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    shards.claim(
        folder,
        config=repr((cfg.model.to_dict(), dataset.to_dict())).encode(),
        checkpoint=Path(checkpoint).read_bytes(),
        images=repr(list(images.images)).encode(),
    )
    loader = cfg.test_dataloader
    loader.batch_size, loader.sampler = 1, dict(type="DkUnfinishedSampler", folder=folder)  # `update` would merge them
    cfg.test_evaluator = dict(type="DkResultShards", folder=folder, category_ids=category_ids)
    cfg.custom_hooks = [hook for hook in cfg.get("custom_hooks") or () if hook.type != "DkContactSheetHook"]
    cfg.load_from, cfg.resume, cfg.work_dir = checkpoint, False, folder
    join_without_gpu(cfg)
    runner = Runner.from_cfg(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model = model.module if tta else model
    translate_names(model)  # checkpoints of MMDetection 1
    check_fits(model, weights, checkpoint)
    runner.test()


def test_set(config: str, options: Sequence[str] = ()) -> tuple[str, str]:
    """The annotation file and the image folder of a config's test set.

    Raises:
        UserError: The config cannot be loaded, or its test set is not one of COCO's kind.
    """
    dataset = _dataset(load_config(config, list(options)), config)
    root, prefix = dataset.get("data_root") or "", dataset.get("data_prefix") or {}
    return os.path.join(root, dataset.ann_file), os.path.join(root, prefix.get("img") or "")


def _dataset(cfg: Config, config: str) -> ConfigDict:
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or ConfigDict()
    if not issubclass(class_of(dataset, DATASETS), CocoDataset):
        raise UserError(f"{config}: test_dataloader has no dataset of COCO's kind, got {dataset.get('type')}")
    return dataset


def _category_ids(dataset: ConfigDict, images: ImageSet) -> list[int]:
    """The id of each label, by the name of the class, as `CocoDataset` gave the labels for training."""
    classes = list(class_of(dataset, DATASETS)._load_metainfo(dataset.get("metainfo"))["classes"])
    ids = {name: i for i, name in images.categories.items() if name in classes}
    if list(ids) != classes:
        raise UserError(
            f"{images.path}: its categories are not the classes of the config in the same order; it has "
            f"{', '.join(list(ids)[:5])} ..., the config {', '.join(classes[:5])} ..."
        )
    return list(ids.values())


@DATA_SAMPLERS.register_module(force=True)
class DkUnfinishedSampler(Sampler):
    """The images of a COCO data set that have no results yet, shared out among the processes.

    Args:
        dataset: The data set.
        folder: Where the results are kept.
        seed: Without effect; the framework passes one to every sampler.
    """

    def __init__(self, dataset: CocoDataset, folder: str, seed: int | None = None) -> None:
        finished = shards.finished(folder)
        unfinished = [i for i in range(len(dataset)) if dataset.get_data_info(i)["img_id"] not in finished]
        rank, number = get_dist_info()
        self._indices = unfinished[rank::number]
        barrier()  # nobody adds a result before all have looked

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


@METRICS.register_module(force=True)
class DkResultShards(BaseMetric):
    """Writes results to disk instead of evaluating them.

    Args:
        folder: Where they are kept.
        category_ids: The category id of each label.
    """

    default_prefix = "shards"

    def __init__(self, folder: str, category_ids: list[int]) -> None:
        super().__init__()
        self._writer = shards.Writer(folder, get_rank())
        self._category_ids = category_ids

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            self._writer.write(sample["img_id"], self._detections(sample["pred_instances"]))

    def _detections(self, instances: dict) -> list[dict]:
        boxes, scores, labels = (instances[key].tolist() for key in ("bboxes", "scores", "labels"))
        detections = [
            dict(category_id=self._category_ids[label], bbox=[left, top, right - left, bottom - top], score=score)
            for (left, top, right, bottom), score, label in zip(boxes, scores, labels, strict=True)
        ]
        if "masks" in instances:
            for detection, mask in zip(detections, encode_mask_results(instances["masks"].cpu().numpy()), strict=True):
                detection["segmentation"] = dict(size=mask["size"], counts=mask["counts"].decode())
        if "mask_scores" in instances:  # Mask Scoring R-CNN
            for detection, score in zip(detections, instances["mask_scores"].tolist(), strict=True):
                detection["mask_score"] = score
        return detections

    def evaluate(self, size: int) -> dict:
        self._writer.close()
        barrier()  # whoever reads the results finds those of all processes
        return {}

    def compute_metrics(self, results: list) -> dict:
        raise NotImplementedError("DkResultShards keeps no results, and evaluates none")
