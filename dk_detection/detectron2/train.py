"""Trains or evaluates the detector of a Detectron2 config, YAML or LazyConfig, with Detectron2's own trainers.

What is added to the framework: learning-rate factors in YAML, torchrun, test-time augmentation of LazyConfigs, a work
folder named after the config, and errors that say what to do.
"""

import argparse
import math
import os
import urllib.error
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from dk_detection.config_files import is_lazy_config
from dk_detection.datasets.coco_check import handed_on
from dk_detection.detectron2.config import add_dk_config
from dk_detection.detectron2.data import check_data
from dk_detection.detectron2.options import override_lazy, override_yaml
from dk_detection.detectron2.solver import LearningRateFactors
from dk_detection.detectron2.tta import tta_of_lazy_config, tta_of_yaml
from dk_detection.detectron2.visualize_hook import hooks_for_pictures
from dk_detection.errors import UserError, catch_sigterm

# What a LazyConfig has to set.
_LAZY_KEYS = {
    **dict.fromkeys(("model", "dataloader", "train", "optimizer", "lr_multiplier"), DictConfig),
    **dict.fromkeys(("train.amp", "train.ddp", "train.checkpointer"), DictConfig),
    **dict.fromkeys(("train.device", "train.output_dir"), str),
    **dict.fromkeys(("train.max_iter", "train.eval_period", "train.log_period"), int),
    "train.amp.enabled": bool,
}
_DEFAULT_OUTPUT_DIR = "./output"  # Detectron2's, the same for all configs
_INTERRUPTED = "interrupted; the same command with --resume continues"


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
    if under_torchrun:
        _join_torchrun()
        return _main(args)
    try:
        launch(_main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
    except ProcessRaisedException as error:  # of several processes; it holds the text of the first one's traceback
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
        if not kind.endswith(UserError.__name__):
            raise
        raise UserError(message) from None
    except KeyboardInterrupt as error:
        raise type(error)(str(error) or _INTERRUPTED) from None


def _join_torchrun() -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def _main(args: argparse.Namespace) -> None:
    catch_sigterm()  # in a process that `launch` started nobody else has
    job = _load(args)
    default_setup(job.cfg, args)
    try:
        with handed_on(job.contents):
            results = job.evaluate(args.resume) if args.eval_only else job.train(args.resume)
    except urllib.error.URLError as error:
        raise UserError(
            f"pretrained weights could not be downloaded ({error.reason}); name a file of them, or start from random "
            "ones with MODEL.WEIGHTS '' (YAML) or train.init_checkpoint='' (LazyConfig)"
        ) from error
    except BaseException as error:
        # Detectron2's hooks run on the way out, and the one that writes the log fails in the first iterations.
        stop = error
        while not isinstance(stop, KeyboardInterrupt):
            if (stop := stop.__context__) is None:
                raise
        known = DetectionCheckpointer(nn.Module(), job.output_dir).has_checkpoint()
        raise type(stop)(_INTERRUPTED if known else "interrupted before the first checkpoint") from None
    if comm.is_main_process():
        _summarise(results or {}, job.output_dir)


def _load(args: argparse.Namespace) -> "_YamlJob | _LazyJob":
    job = (_LazyJob if is_lazy_config(args.config_file) else _YamlJob)(args.config_file, args.opts)
    try:
        torch.device(job.device)
    except RuntimeError as error:
        raise UserError(f"{args.config_file}: {job.device!r} is no device ({_reason(error)})") from error
    if job.device.startswith("cuda") and not torch.cuda.is_available():
        job.device = "cpu"
    if job.amp and job.device == "cpu" and not args.eval_only:
        raise UserError(f"{args.config_file}: Detectron2 trains with mixed precision on a GPU only, and there is none")
    if job.output_dir == _DEFAULT_OUTPUT_DIR:
        job.output_dir = os.path.join("work_dirs", os.path.splitext(os.path.basename(args.config_file))[0])
    data = job.data() | ({"train": []} if args.eval_only else {})
    job.contents = check_data(**data) if comm.is_main_process() else {}
    if isinstance(job, _YamlJob):  # a LazyConfig brings its evaluator
        for name in job.cfg.DATASETS.TEST:
            if (kind := MetadataCatalog.get(name).get("evaluator_type")) != "coco":
                raise UserError(f"{name}: only data sets of COCO's kind can be evaluated here, this one's is {kind}")
    weights = job.weights
    resumes = args.resume and os.path.isfile(os.path.join(job.output_dir, "last_checkpoint"))
    if weights and not resumes and "://" not in weights and not os.path.isfile(weights.partition("?")[0]):
        raise UserError(f"{weights}: there is no such checkpoint")
    if args.eval_only and not weights and not resumes:
        raise UserError(
            f"--eval-only: name a checkpoint with {job.WEIGHTS.format('CKPT')}, or write --resume for the last"
        )
    return job


class _Trainer(DefaultTrainer):
    """Detectron2's trainer, with learning-rate factors and COCO evaluation."""

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
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, folder))

    @classmethod
    def test_augmented(cls, cfg, model) -> dict:
        """Evaluates with test-time augmentation, where the config asks for it."""
        if not cfg.TEST.AUG.ENABLED:
            return {}
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, tta_of_yaml(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}


class _Setting:
    """An attribute of a job that is a setting of its config, `cfg`."""

    def __init__(self, name: str) -> None:
        *self.path, self.name = name.split(".")

    def _node(self, job):
        return reduce(getattr, self.path, job.cfg)

    def __get__(self, job, owner=None):
        return getattr(self._node(job), self.name)

    def __set__(self, job, value) -> None:
        setattr(self._node(job), self.name, value)


class _YamlJob:
    WEIGHTS = "MODEL.WEIGHTS {}"
    device, output_dir, weights, amp = map(
        _Setting, ("MODEL.DEVICE", "OUTPUT_DIR", "MODEL.WEIGHTS", "SOLVER.AMP.ENABLED")
    )

    def __init__(self, path: str, opts: list[str]) -> None:
        self.cfg = get_cfg()
        add_dk_config(self.cfg)
        try:
            self.cfg.merge_from_file(path)
        except Exception as error:
            raise UserError(f"{path}: the config cannot be loaded ({_reason(error)})") from error
        override_yaml(self.cfg, opts)

    def data(self) -> dict:
        """The arguments of `check_data`."""
        model = self.cfg.MODEL
        network = model.DK.NETWORK if model.META_ARCHITECTURE == "DkDeformable" else model.META_ARCHITECTURE
        heads = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "DkMimicRCNN": "ROI_HEADS"}
        heads |= {"RetinaNet": "RETINANET"}
        head = heads.get(network)
        return dict(
            train=list(self.cfg.DATASETS.TRAIN),
            test=list(self.cfg.DATASETS.TEST),
            masks=model.MASK_ON,
            rle=self.cfg.INPUT.MASK_FORMAT == "bitmask",
            filter_empty=self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            num_classes={f"MODEL.{head}.NUM_CLASSES": model[head].NUM_CLASSES} if head else {},
        )

    def train(self, resume: bool) -> dict:
        trainer = _Trainer(self.cfg)
        with _keeping(trainer.optimizer):
            trainer.resume_or_load(resume)
        if self.cfg.TEST.AUG.ENABLED:
            trainer.register_hooks([hooks.EvalHook(0, lambda: _Trainer.test_augmented(self.cfg, trainer.model))])
        trainer.train()
        return _latest(trainer)

    def evaluate(self, resume: bool) -> dict:
        model = _Trainer.build_model(self.cfg)
        DetectionCheckpointer(model, self.output_dir).resume_or_load(self.weights, resume=resume)
        return flatten_results_dict(_Trainer.test(self.cfg, model) | _Trainer.test_augmented(self.cfg, model))


class _LazyJob:
    WEIGHTS = "train.init_checkpoint={}"
    device, output_dir, weights, amp = map(
        _Setting, ("train.device", "train.output_dir", "train.init_checkpoint", "train.amp.enabled")
    )

    def __init__(self, path: str, opts: list[str]) -> None:
        try:
            self.cfg = LazyConfig.load(path)
        except Exception as error:
            raise UserError(f"{path}: the config cannot be loaded ({_reason(error)})") from error
        keys = {key.partition(".")[0] for key in _LAZY_KEYS}
        self.cfg = override_lazy(self.cfg, opts, keys | {"tta"})
        for key, kind in _LAZY_KEYS.items():
            value = OmegaConf.select(self.cfg, key)
            if value is None:
                raise UserError(f"{path}: the config sets no {key}")
            if not isinstance(value, kind):
                raise UserError(f"{path}: {key} is {value!r}, expected {kind.__name__}")

    def data(self) -> dict:
        """The arguments of `check_data`."""
        names = (OmegaConf.select(self.cfg.dataloader, f"{split}.dataset.names") or [] for split in ("train", "test"))
        train, test = ([value] if isinstance(value, str) else list(value) for value in names)
        loader = self.cfg.dataloader.get("train") or {}
        return dict(
            train=train,
            test=test,
            masks=bool(OmegaConf.select(loader, "mapper.use_instance_mask")),
            rle=OmegaConf.select(loader, "mapper.instance_mask_format") == "bitmask",
            filter_empty=OmegaConf.select(loader, "dataset.filter_empty") is not False,
            num_classes=dict(_num_classes(self.cfg.model, "model")),
        )

    def train(self, resume: bool) -> dict:
        cfg = self.cfg
        model = instantiate(cfg.model).to(cfg.train.device)
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        loader = instantiate(cfg.dataloader.train)
        # Detectron2 takes it for granted that each process has a GPU.
        devices = {"device_ids": None} if self.device == "cpu" else {}
        model = create_ddp_model(model, **cfg.train.ddp, **devices)
        trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
        checkpointer = DetectionCheckpointer(model, self.output_dir, trainer=trainer)
        trainer.register_hooks(
            [hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))]
            + ([hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)] if comm.is_main_process() else [])
            + [hooks.EvalHook(cfg.train.eval_period, lambda: self._test(model))]
        )
        trainer.register_hooks(hooks_for_pictures(model, loader, cfg.train.get("dk_visualize") or {}))
        if comm.is_main_process():  # last, so that the figures of an evaluation are written too
            writers = default_writers(self.output_dir, cfg.train.max_iter)
            trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period)])
        with _keeping(optimizer):
            checkpointer.resume_or_load(self.weights, resume=resume)
        resumed = resume and checkpointer.has_checkpoint()
        trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
        return _latest(trainer)

    def evaluate(self, resume: bool) -> dict:
        model = instantiate(self.cfg.model).to(self.cfg.train.device)
        DetectionCheckpointer(model, self.output_dir).resume_or_load(self.weights, resume=resume)
        return flatten_results_dict(self._test(model))

    def _test(self, model) -> dict:
        if "evaluator" not in self.cfg.dataloader:
            return {}
        results = self._inference(model, "inference")
        if "tta" in self.cfg and self.cfg.tta.enabled:
            augmented = tta_of_lazy_config(self.cfg.tta, model)
            results |= {f"{name}_TTA": value for name, value in self._inference(augmented, "inference_TTA").items()}
        return results

    def _inference(self, model, folder: str) -> dict:
        evaluator = instantiate(self.cfg.dataloader.evaluator)
        if isinstance(evaluator, COCOEvaluator):
            evaluator = instantiate(
                {**self.cfg.dataloader.evaluator, "output_dir": os.path.join(self.output_dir, folder)}
            )
        results = inference_on_dataset(model, instantiate(self.cfg.dataloader.test), evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return results or {}


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


def _num_classes(node: DictConfig, place: str) -> Iterator[tuple[str, int]]:
    """The numbers of classes of a model's heads with their places; of others than boxes and masks they may differ."""
    for key, value in node.items():
        if isinstance(value, DictConfig) and key not in ("backbone", "sem_seg_head"):
            yield from _num_classes(value, f"{place}.{key}")
        elif key == "num_classes" and isinstance(value, int):
            yield f"{place}.{key}", value


def _latest(trainer) -> dict:
    """The figures of the last evaluation, as the trainer's log has them."""
    return {name: value for name, (value, _) in trainer.storage.latest().items() if "/AP" in name}


def _summarise(results: dict, output_dir: str) -> None:
    names = {"bbox": "box AP", "segm": "mask AP"}
    names |= {f"{kind}_TTA": f"{figure} with augmentation" for kind, figure in names.items()}
    figures = []
    for key, value in results.items():
        *data_set, kind, metric = key.split("/")  # the data set is named where there are several
        if metric == "AP" and kind in names:
            # Detectron2's nan: nothing was detected, or there is nothing to compare with.
            figures.append(" ".join([*data_set, names[kind], "undefined" if math.isnan(value) else f"{value:.1f}"]))
    if figures:
        print(f"{', '.join(figures)} (COCO metric, 0 to 100)", flush=True)
    print(f"Everything is in {output_dir}", flush=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
