"""Trains or evaluates the detector of a Detectron2 config, YAML or LazyConfig, with Detectron2's own trainers.

What is added to the framework: learning-rate factors in YAML, torchrun, test-time augmentation of LazyConfigs, a work
folder named after the config, and errors that say what to do.
"""

import argparse
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import OmegaConf
from torch import nn

from dk_detection.config_files import differences, is_lazy_config
from dk_detection.datasets.coco_check import handed_on
from dk_detection.detectron2.data import check_data
from dk_detection.detectron2.jobs import LazyJob, YamlJob, building, load_job, load_weights, reading, start
from dk_detection.detectron2.solver import LearningRateFactors
from dk_detection.detectron2.visualize_hook import hooks_for_pictures
from dk_detection.detectron2.voc import DkVOCEvaluator
from dk_detection.errors import UserError, catch_sigterm

_DEFAULT_OUTPUT_DIR = "./output"  # Detectron2's, the same for all configs
_INTERRUPTED = "interrupted; the same command with --resume continues"
_BRANCHES = {"conv_offset", "kernel_offset", "offset_fc"}  # what makes the offsets of our layers
# Settings that may be others whenever a run is resumed, besides those for tests.
_HARMLESS = {"WEIGHTS", "DEVICE", "NUM_WORKERS", "CHECKPOINT_PERIOD", "VIS_PERIOD", "num_workers", "vis_period"}


def run(args: argparse.Namespace) -> None:
    """Trains, and evaluates as often as the config says; or evaluates only.

    Under torchrun this process is one of many already; otherwise those asked for are started.

    Args:
        args: The options of tools/train_net.py.

    Raises:
        UserError: Something that the user can put right.
        KeyboardInterrupt: With a message that tells how to continue.
    """
    os.environ.pop("DETECTRON2_ENV_MODULE", None)  # for Detectron2's own scripts; ours needs none
    under_torchrun = "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
    processes = int(os.environ["WORLD_SIZE"]) if under_torchrun else args.num_gpus * args.num_machines
    if torch.cuda.is_available():
        if not under_torchrun and args.num_gpus > torch.cuda.device_count():
            raise UserError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}")
    elif processes > 1 and not args.eval_only and not is_lazy_config(args.config_file):
        raise UserError(
            f"{args.config_file}: Detectron2 trains a YAML config in several processes on GPUs only, and there is "
            "none; a LazyConfig trains on the CPU, too"
        )
    try:
        start(_main, (args,), args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    except KeyboardInterrupt as error:
        raise type(error)(str(error) or _INTERRUPTED) from None


def _main(args: argparse.Namespace) -> None:
    catch_sigterm()  # in a process that `launch` started nobody else has
    job = _load(args)
    default_setup(job.cfg, args)
    try:
        with handed_on(job.contents):
            train = _train_yaml if isinstance(job, YamlJob) else _train_lazy
            results = (_evaluate if args.eval_only else train)(job, args.resume)
    except BaseException as error:
        # Detectron2's hooks run on the way out, and the one that writes the log fails in the first iterations.
        stop = error
        while not isinstance(stop, KeyboardInterrupt):
            if (stop := stop.__context__) is None:
                raise
        raise type(stop)(_INTERRUPTED if job.last_checkpoint() else "interrupted before the first checkpoint") from None
    finally:
        _end_log()
    if comm.is_main_process():
        _summarise(results or {}, job.output_dir)


def _end_log() -> None:
    """Detectron2's loggers write to the folder of every run that a process has made, each line once for each."""
    for logger in map(logging.getLogger, ("detectron2", "fvcore")):
        for handler in tuple(logger.handlers):
            logger.removeHandler(handler)
    setup_logger.cache_clear()


def _load(args: argparse.Namespace) -> YamlJob | LazyJob:
    job = load_job(args.config_file, args.opts).prepare()
    if job.amp and job.device == "cpu" and not args.eval_only:
        raise UserError(f"{args.config_file}: Detectron2 trains with mixed precision on a GPU only, and there is none")
    if job.output_dir == _DEFAULT_OUTPUT_DIR:
        job.output_dir = os.path.join("work_dirs", os.path.splitext(os.path.basename(args.config_file))[0])
    checkpoint = job.checkpoint(args.resume)
    with reading(checkpoint):
        if args.resume and not args.eval_only and job.last_checkpoint():
            _check_same_run(job, checkpoint)
    data = job.data() | ({"train": []} if args.eval_only else {})
    job.contents = check_data(**data) if comm.is_main_process() else {}
    if isinstance(job, YamlJob):  # a LazyConfig brings its evaluator
        for name in job.cfg.DATASETS.TEST:
            if (kind := MetadataCatalog.get(name).get("evaluator_type")) not in ("coco", "pascal_voc"):
                raise UserError(f"{name}: only data sets like COCO and PASCAL VOC can be evaluated here, not of {kind}")
    if args.eval_only and not checkpoint:
        raise UserError(
            f"--eval-only: name a checkpoint with {job.WEIGHTS.format('CKPT')}, or write --resume for the last"
        )
    return job


class _Settings:
    """Puts the settings of a run into its checkpoints, for `_check_same_run`."""

    def __init__(self, settings: dict) -> None:
        self.settings = settings

    def state_dict(self) -> dict:
        return self.settings

    def load_state_dict(self, settings: dict) -> None:
        """They stay as they are: the run goes on with its own."""


def _check_same_run(job: YamlJob | LazyJob, checkpoint: str) -> None:
    """Refuses to resume the run of another model or other data, and says what else differs."""
    theirs = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False).get("settings")
    ours = job.settings()
    if theirs is None:  # of Detectron2's own script
        return
    if found := differences(theirs, ours, job.identity, _may_differ):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"it belongs to the run of another config; they differ in {'; '.join(found[:3])}{more}. Choose another "
            "output folder, or the config and options of that run"
        )
    if comm.is_main_process():
        for difference in differences(theirs, ours, job.from_here_on, _may_differ):
            print(f"{checkpoint}: the run goes on with another {difference}.", flush=True)


def _may_differ(key: str) -> bool:
    return key in _HARMLESS or "test" in key.lower().split("_")


class Trainer(DefaultTrainer):
    """Detectron2's trainer, with learning-rate factors and the evaluation of COCO and PASCAL VOC."""

    @classmethod
    def build_model(cls, cfg):
        with building("the model of the config"):
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg, model):
        optimizer = super().build_optimizer(cfg, model)
        factor = LearningRateFactors(dict(cfg.SOLVER.DK_LR_FACTORS))
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            by_factor = defaultdict(list)
            for parameter in group["params"]:
                by_factor[factor(names[parameter])].append(parameter)
            groups += [
                {**group, "params": parameters, "lr": group["lr"] * value} for value, parameters in by_factor.items()
            ]
        optimizer.param_groups = groups
        return optimizer

    def build_hooks(self):
        settings = {name.lower(): value for name, value in self.cfg.DK_VISUALIZE.items()}
        # In front of the writers, which then see what belongs to their iteration.
        return [*hooks_for_pictures(self.model, self._trainer.data_loader, settings), *super().build_hooks()]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, folder="inference"):
        if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
            return DkVOCEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, folder))

    @classmethod
    def test_augmented(cls, cfg, augmented) -> dict:
        """Evaluates a detector with test-time augmentation."""
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        return {f"{name}_TTA": value for name, value in cls.test(cfg, augmented, evaluators).items()}


def _train_yaml(job: YamlJob, resume: bool) -> dict:
    cfg = job.cfg
    trainer = Trainer(cfg)
    _say_unused(dict(cfg.SOLVER.DK_LR_FACTORS), trainer.model)
    trainer.checkpointer.add_checkpointable("settings", _Settings(job.settings()))
    with _keeping(trainer.optimizer), reading(job.checkpoint(resume)):
        trainer.resume_or_load(resume)
    if cfg.TEST.AUG.ENABLED:
        augmented = job.augmented(trainer.model)
        trainer.register_hooks([hooks.EvalHook(0, lambda: Trainer.test_augmented(cfg, augmented))])
    trainer.train()
    return _latest(trainer)


def _train_lazy(job: LazyJob, resume: bool) -> dict:
    cfg, settings = job.cfg, _Settings(job.settings())
    model = job.build_model(job.device)
    _say_unused(OmegaConf.select(cfg, "optimizer.params.lr_factor_func.factors") or {}, model)
    cfg.optimizer.params.model = model
    with building(f"{job.path}: the optimizer"):
        optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    # Detectron2 takes it for granted that each process has a GPU.
    devices = {"device_ids": None} if job.device == "cpu" else {}
    model = create_ddp_model(model, **cfg.train.ddp, **devices)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, job.output_dir, trainer=trainer, settings=settings)
    models = _models(job, model)
    trainer.register_hooks(
        [hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))]
        + ([hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)] if comm.is_main_process() else [])
        + [hooks.EvalHook(cfg.train.eval_period, lambda: _test_lazy(job, models))]
    )
    trainer.register_hooks(hooks_for_pictures(model, loader, cfg.train.get("dk_visualize") or {}))
    if comm.is_main_process():  # last, so that the figures of an evaluation are written too
        writers = default_writers(job.output_dir, cfg.train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])
    with _keeping(optimizer), reading(job.checkpoint(resume)):
        checkpointer.resume_or_load(job.weights, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return _latest(trainer)


def _say_unused(factors: Mapping[str, float], model: nn.Module) -> None:
    """Says which learning-rate factors are of no parameter, but for those that base configs set for any layers."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in factors.keys() - _BRANCHES:
        if comm.is_main_process() and not any(part in name for name in names):
            print(f"learning-rate factor of {part!r}: no parameter that learns has this in its name", flush=True)


def _evaluate(job: YamlJob | LazyJob, resume: bool) -> dict:
    model = job.build_model(job.device)
    load_weights(model, job.checkpoint(resume))
    if isinstance(job, LazyJob):
        return flatten_results_dict(_test_lazy(job, _models(job, model)))
    results = Trainer.test(job.cfg, model)
    if job.cfg.TEST.AUG.ENABLED:
        results |= Trainer.test_augmented(job.cfg, job.augmented(model))
    return flatten_results_dict(results)


def _models(job: LazyJob, model: nn.Module) -> dict[str, nn.Module]:
    """What is evaluated: the model and, if the config asks for it, the same with test-time augmentation."""
    return {"": model} | ({"_TTA": job.augmented(model)} if job.cfg.get("tta") and job.cfg.tta.enabled else {})


def _test_lazy(job: LazyJob, models: dict[str, nn.Module]) -> dict:
    loader, results = job.cfg.dataloader, {}
    for suffix, model in models.items() if "evaluator" in loader else ():
        evaluator = instantiate(loader.evaluator)
        if isinstance(evaluator, COCOEvaluator):
            folder = os.path.join(job.output_dir, f"inference{suffix}")
            evaluator = instantiate({**loader.evaluator, "output_dir": folder})
        found = inference_on_dataset(model, instantiate(loader.test), evaluator) or {}
        if comm.is_main_process():
            print_csv_format(found)
        results |= {f"{name}{suffix}": value for name, value in found.items()}
    return results


@contextmanager
def _keeping(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Refuses a checkpoint that puts other settings of the optimiser in place of the config's; only `lr` may move."""

    def settings() -> list[dict]:
        return [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            | {"initial_lr": group.get("initial_lr", group["lr"])}
            for group in optimizer.param_groups
        ]

    asked = settings()
    yield
    for ours, theirs in zip(asked, settings(), strict=True):
        if unlike := [key for key in ours if theirs.get(key) != ours[key]]:
            key, name = unlike[0], unlike[0].replace("initial_lr", "learning rate")
            raise UserError(
                f"--resume goes on with the optimiser of the checkpoint: {name} {theirs.get(key)} there, {ours[key]} "
                "in the config; choose another output folder and name the checkpoint as weights to start a new run from"
            )


def _latest(trainer) -> dict:
    """The figures of the last evaluation, as the trainer's log has them."""
    return {name: value for name, (value, _) in trainer.storage.latest().items() if "/AP" in name}


def _summarise(results: dict, output_dir: str) -> None:
    names = {"bbox": "box AP", "segm": "mask AP"}
    names |= {f"{kind}_TTA": f"{figure} with augmentation" for kind, figure in names.items()}
    figures, voc = [], []
    for key, value in results.items():
        *data_set, kind, metric = key.split("/")  # the data set is named where there are several
        if f"{key.rpartition('/')[0]}/AP" not in results and re.fullmatch(r"AP\d\d", metric):  # of PASCAL VOC
            voc.append(" ".join([*data_set, f"mAP@{int(metric[2:]) / 100:g} {value:.1f}"]))
        if metric == "AP" and kind in names:
            # Detectron2's nan: nothing was detected, or there is nothing to compare with.
            figures.append(" ".join([*data_set, names[kind], "undefined" if math.isnan(value) else f"{value:.1f}"]))
    if figures:
        print(f"{', '.join(figures)} (COCO metric, 0 to 100)", flush=True)
    if voc:
        print(f"{', '.join(voc)} (PASCAL VOC metric, 0 to 100)", flush=True)
    print(f"Everything is in {output_dir}", flush=True)
