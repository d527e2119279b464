"""Trains or evaluates the model of a config of MMEngine: the frameworks' train.py and test.py with a safety net.

What is added to the framework: data and checkpoints are checked before anything starts, a finished result is never
overwritten by accident, the results of the last evaluation stay in the work folder as files, and several processes
train without a GPU, too.
"""

import argparse
import glob
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import re
import urllib.error
import warnings

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import METRICS, RUNNERS, init_default_scope
from mmengine.runner import Runner

from dk_detection.convert import translate_names
from dk_detection.datasets.coco_check import handed_on
from dk_detection.errors import UserError
from dk_detection.mmengine.checkpoints import (
    bring_to_schedule,
    check_fits,
    check_same_run,
    latest_checkpoint,
    read_checkpoint,
    read_training_state,
)
from dk_detection.mmengine.data_checks import check_data, class_of, evaluators_of
from dk_detection.mmengine.options import load_config


def run(args: argparse.Namespace) -> None:
    """Trains, and evaluates as often as the config says; or evaluates only.

    Args:
        args: The options of tools/train_net.py.

    Raises:
        UserError: Something that the user can put right.
        KeyboardInterrupt: With a message that tells how to continue.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    # Said by the libraries about each other; nothing that a user can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="mm")
    warnings.filterwarnings("ignore", message="``build_loss`` would be deprecated soon")
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected")

    cfg = load_config(args.config_file, args.cfg_options)
    init_default_scope(cfg.get("default_scope") or "mmengine")
    needed = ("model", "test_cfg") if args.eval_only else ("model", "train_cfg", "train_dataloader", "optim_wrapper")
    if missing := [key for key in needed if cfg.get(key) is None]:
        raise UserError(f"{args.config_file}: the config sets no {missing[0]}")
    set_launcher(cfg, args.launcher)
    stem = os.path.splitext(os.path.basename(args.config_file))[0]
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", stem)
    if args.amp:
        if get_device() == "cpu":
            raise UserError("--amp: MMEngine trains with mixed precision on a GPU only, and there is none")
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if not {"enable", "base_batch_size"} <= (cfg.get("auto_scale_lr") or {}).keys():
            raise UserError(
                f"--auto-scale-lr: {args.config_file} lacks auto_scale_lr=dict(enable=..., base_batch_size=...)"
            )
        cfg.auto_scale_lr.enable = True
    for mode in ("val", "test"):
        _keep_results(cfg, mode)

    try:
        if args.eval_only:
            _evaluate(cfg, "test", args.checkpoint)
        else:
            _train(cfg, args.resume or (cfg.get("resume") and (cfg.get("load_from") or "auto")))
    except urllib.error.URLError as error:
        raise UserError(
            f"pretrained weights could not be downloaded ({error.reason}); name a file of them with --cfg-options "
            "model.backbone.init_cfg.checkpoint=FILE, or start from random ones with model.backbone.init_cfg=None"
        ) from error


def _train(cfg: Config, resume: str | None) -> None:
    last, differences = latest_checkpoint(cfg.work_dir), []
    if not resume:
        if last:
            raise UserError(
                f"{cfg.work_dir} holds a run already ({os.path.basename(last)}): continue it with --resume, or choose "
                "another --work-dir"
            )
    elif resume != "auto" or last:
        source = last if resume == "auto" else resume
        state = read_training_state(source)
        differences = check_same_run(cfg, state, source)
        if last and last != source:
            check_same_run(cfg, read_training_state(last), last)
        if _is_finished(cfg, state):
            _finish(cfg, source, state["meta"]["iter"])
            return
        cfg.resume, cfg.load_from = True, source
        for difference in differences:
            _say(f"{source}: the run goes on with another {difference}.")
    else:
        _say(f"{cfg.work_dir} holds no checkpoint yet: starting from scratch.")
        cfg.resume = False
    for path in _weight_files(cfg):
        read_checkpoint(path)
    contents = _check_data(cfg, ("train",) if cfg.get("val_cfg") is None else ("train", "val"))

    runner = _build_runner(cfg)
    if any(difference.startswith(("param_scheduler", "train_dataloader")) for difference in differences):
        runner.register_hook(_ScheduleHook(), priority="LOWEST")
    try:
        with handed_on(contents):
            runner.train()
    except KeyboardInterrupt as error:
        last = latest_checkpoint(cfg.work_dir)
        raise type(error)(
            f"interrupted; the same command with --resume continues from {last}"
            if last
            else "interrupted before the first checkpoint"
        ) from None
    _summarise(cfg, "val")


def _finish(cfg: Config, checkpoint: str, iteration: int) -> None:
    """For a run whose training is complete: evaluates if that has not been done."""
    record = _read_record(cfg, "val")
    files = [os.path.join(cfg.work_dir, file) for file in record.get("files", [])]
    done = record.get("iteration") == iteration and all(map(os.path.isfile, files))
    if done or cfg.get("val_cfg") is None:
        _say(f"{checkpoint}: the training is finished{' and evaluated' if done else ''}.")
        _summarise(cfg, "val")
    else:
        _say(f"{checkpoint}: the training is finished; evaluating.")
        _evaluate(cfg, "val", checkpoint)


def _evaluate(cfg: Config, mode: str, checkpoint: str | None) -> None:
    path = checkpoint or cfg.get("load_from") or latest_checkpoint(cfg.work_dir)
    if not path:
        raise UserError(f"--eval-only: {cfg.work_dir} holds no checkpoint; name one with --checkpoint CKPT")
    if "://" not in path:
        read_checkpoint(path)
    contents = _check_data(cfg, (mode,))
    cfg.resume, cfg.load_from = False, path
    with handed_on(contents):
        getattr(_build_runner(cfg, evaluates=True), mode)()
    _summarise(cfg, mode)


def _build_runner(cfg: Config, evaluates: bool = False) -> Runner:
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--work-dir {cfg.work_dir}: the folder cannot be made ({error.strerror})") from error
    join_without_gpu(cfg)
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    translate_names(getattr(runner.model, "module", runner.model))  # checkpoints of MMDetection 1
    runner.register_hook(_RunHook(evaluates), priority="LOWEST")
    return runner


def set_launcher(cfg: Config, launcher: str | None) -> None:
    """Sets what has started this process as one of several; None: pytorch under torchrun, else what the config says."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    cfg.launcher = launcher or ("pytorch" if under_torchrun else cfg.get("launcher") or "none")


def join_without_gpu(cfg: Config) -> None:
    """Joins the processes that torchrun started without a GPU; MMEngine takes it for granted that each has one.

    Raises:
        UserError: Another launcher has started them.
    """
    if cfg.launcher == "none" or get_device() != "cpu":
        return
    if cfg.launcher != "pytorch":
        raise UserError(f"--launcher {cfg.launcher} needs a GPU in each process; without one use torchrun")
    torch.distributed.init_process_group("gloo")
    settings = {"broadcast_buffers": False, "find_unused_parameters": cfg.get("find_unused_parameters", False)}
    cfg.model_wrapper_cfg = (cfg.get("model_wrapper_cfg") or settings) | {"device_ids": None}


def _check_data(cfg: Config, modes: tuple[str, ...]) -> dict[str, dict]:
    """With the check of our adapter for the framework, `dk_detection.mmdet`, where there is one."""
    if not _is_main_process():
        return {}
    adapter = importlib.util.find_spec(f"dk_detection.{cfg.get('default_scope')}")
    check = importlib.import_module(adapter.name).check_data if adapter else check_data
    return check(cfg, modes)


def _is_finished(cfg: Config, state: dict) -> bool:
    loop, meta = cfg.train_cfg, state["meta"]
    return meta["iter"] >= loop.get("max_iters", math.inf) or meta["epoch"] >= loop.get("max_epochs", math.inf)


def _weight_files(cfg: Config) -> list[str]:
    """The local files whose weights a new training starts from."""
    paths = [] if cfg.get("resume") else [cfg.get("load_from")]
    todo = [cfg.model]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
            if value.get("type") == "Pretrained":
                paths.append(value.get("checkpoint"))
        elif isinstance(value, (list, tuple)):
            todo += value
    return [path for path in paths if path and "://" not in path]


def _keep_results(cfg: Config, mode: str) -> None:
    """Lets evaluators leave their result files in the work folder, where the config does not say another place."""
    evaluators = evaluators_of(cfg, mode)
    for i, evaluator in enumerate(evaluators):
        takes_prefix = "outfile_prefix" in inspect.signature(class_of(evaluator, METRICS)).parameters
        if takes_prefix and not evaluator.get("outfile_prefix"):
            evaluator["outfile_prefix"] = os.path.join(cfg.work_dir, f"{mode}{i}" if len(evaluators) > 1 else mode)


class _ScheduleHook(Hook):
    """For a run that is resumed with another schedule or batch."""

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        old = checkpoint["optimizer"]["param_groups"][0]["lr"]
        bring_to_schedule(checkpoint, runner)
        new = checkpoint["optimizer"]["param_groups"][0]["lr"]
        _say(f"The schedule goes on as if it had been so from the start: learning rate {new:g}, it was {old:g} there.")


class _RunHook(Hook):
    """Evaluates no half-loaded model, and leaves the figures of the last evaluation in the work folder."""

    def __init__(self, evaluates: bool) -> None:
        self.evaluates, self.iteration = evaluates, None

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        self.iteration = checkpoint.get("meta", {}).get("iter")
        if self.evaluates:
            check_fits(runner.model, checkpoint, runner.cfg.load_from)

    def after_val_epoch(self, runner, metrics=None) -> None:
        self._write(runner, "val", metrics)

    def after_test_epoch(self, runner, metrics=None) -> None:
        self._write(runner, "test", metrics)

    @master_only
    def _write(self, runner, mode: str, metrics) -> None:
        prefixes = filter(None, (evaluator.get("outfile_prefix") for evaluator in evaluators_of(runner.cfg, mode)))
        path = _record_path(runner.cfg, mode)
        files = {file for prefix in prefixes for file in glob.glob(f"{glob.escape(prefix)}.*")}
        record = {
            "iteration": runner.iter or self.iteration,
            "metrics": {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, numbers.Real)},
            "files": sorted(os.path.relpath(file, runner.cfg.work_dir) for file in files - {path}),
        }
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
        os.replace(f"{path}.tmp", path)  # a record is whole or not there


def _record_path(cfg: Config, mode: str) -> str:
    return os.path.join(cfg.work_dir, f"{mode}.metrics.json")


def _read_record(cfg: Config, mode: str) -> dict:
    try:
        with open(_record_path(cfg, mode), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def _summarise(cfg: Config, mode: str) -> None:
    if record := _read_record(cfg, mode):
        metrics = record["metrics"]
        names = {"coco/bbox_mAP": "box AP", "coco/segm_mAP": "mask AP"}
        figures = [f"{name} {_figure(metrics[key])}" for key, name in names.items() if key in metrics]
        voc = [
            f"mAP@{int(key[-2:]) / 100:g} {100 * value:.1f}"
            for key, value in metrics.items()
            if re.fullmatch(r"pascal_voc/AP\d\d", key)
        ]
        if figures:
            _say(f"{mode}: {', '.join(figures)} (COCO metric, 0 to 100)")
        elif voc:
            _say(f"{mode}: {', '.join(voc)} (PASCAL VOC metric, 0 to 100)")
        elif metrics:
            _say(f"{mode}: {', '.join(f'{key} {value:g}' for key, value in metrics.items())}")
        else:  # nothing was detected, or results were written only
            _say(f"{mode}: no figures; the log says why")
    _say(f"Everything is in {cfg.work_dir}")


def _figure(ap: float) -> str:
    return f"{100 * ap:.1f}" if ap >= 0 else "undefined"  # pycocotools' -1: there is nothing to compare with


def _is_main_process() -> bool:
    rank = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))
    return next(filter(None, rank), "0") == "0"


def _say(text: str) -> None:
    if _is_main_process():
        print(text, flush=True)
