"""Reads checkpoints with care: whether they are whole, fit the model, and belong to the run that is to continue."""

import os
import warnings
from inspect import signature

import torch
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, load_state_dict
from torch import nn

from dk_detection.config_files import differences
from dk_detection.errors import UserError

# What makes a run what it is. A run may go on with another work folder, length, log or launcher.
_IDENTITY = (
    "model",
    "train_dataloader.dataset",
    "val_dataloader.dataset",
    "optim_wrapper.optimizer",
    "optim_wrapper.paramwise_cfg",
)
# What a run may go on with, and should be told: it acts from there on.
_FROM_HERE_ON = ("param_scheduler", "train_dataloader.batch_size", "optim_wrapper.clip_grad", "train_cfg")
# Without effect on a model whose weights come from a checkpoint.
_IRRELEVANT = {"init_cfg", "test_cfg", "backend_args"}
# The branch of DkMimicRCNN, without effect on predictions: a detector with it and one without are the same.
_TRAINING_ONLY = "mimic.classifier."


def read_checkpoint(path: str) -> dict:
    """Loads a checkpoint to the CPU. Loading runs code that the file may hold: it has to come from a trusted source.

    Raises:
        UserError: It is missing, incomplete or no checkpoint.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # depending on where the file ends, nearly any
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: the checkpoint cannot be read, it is corrupt or incomplete ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: this is no checkpoint, it holds a {type(checkpoint).__name__}")
    return checkpoint


def read_training_state(path: str) -> dict:
    """Loads a checkpoint that a training can continue from.

    Raises:
        UserError: It is missing, incomplete or has no state of a training.
    """
    checkpoint = read_checkpoint(path)
    missing = {"meta", "state_dict", "message_hub", "optimizer"} - checkpoint.keys()
    if missing or not {"cfg", "epoch", "iter"} <= checkpoint["meta"].keys():
        raise UserError(
            f"{path}: the checkpoint has weights only, no training can continue from it; to start a new training from "
            f"its weights write --cfg-options load_from={path}"
        )
    return checkpoint


def latest_checkpoint(work_dir: str) -> str | None:
    """The newest complete checkpoint of a work folder, None where there is none."""
    record = os.path.join(work_dir, "last_checkpoint")  # written after the checkpoint
    if not os.path.isfile(record):
        return None
    with open(record, encoding="utf-8") as file:
        path = file.read().strip()
    here = os.path.join(work_dir, os.path.basename(path))  # the folder may have been moved or copied since
    return here if os.path.isfile(here) else path


def check_fits(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Checks that each weight that a model predicts with is in the checkpoint and the other way round.

    The framework only warns; the figures of a half-loaded model would look like a bad result.

    Raises:
        UserError: They do not fit.
    """
    state = checkpoint.get("state_dict", checkpoint)
    state, own = (
        {key.removeprefix("module."): value for key, value in weights.items()}
        for weights in (state, model.state_dict())
    )
    state = {key: value for key, value in state.items() if not key.startswith(_TRAINING_ONLY)}
    state |= {key: value for key, value in own.items() if key.startswith(_TRAINING_ONLY)}
    try:
        load_state_dict(model, state, strict=True)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        short = "; ".join(reason if len(reason) < 200 else f"{reason[:200]}..." for reason in reasons[:2])
        raise UserError(f"{path}: the checkpoint does not fit the model of this config: {short}") from error


def check_same_run(cfg: Config, checkpoint: dict, path: str) -> list[str]:
    """Checks that a checkpoint comes from a run with the same model, data and optimiser as the config's.

    Returns:
        Other settings that differ, with which a run may go on.

    Raises:
        UserError: It does not; the message names the first settings that differ.
    """
    try:
        theirs = Config.fromstring(checkpoint["meta"]["cfg"], ".py").to_dict()
    except Exception as error:
        raise UserError(f"{path}: the config that the checkpoint was trained with cannot be read ({error})") from error
    ours = cfg.to_dict()
    if found := differences(theirs, ours, _IDENTITY, _IRRELEVANT.__contains__):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{path} belongs to the run of another config; they differ in {'; '.join(found[:3])}{more}. Choose another "
            f"--work-dir, or the config and options of that run; --cfg-options load_from={path} starts a new run from "
            "its weights"
        )
    return differences(theirs, ours, _FROM_HERE_ON, _IRRELEVANT.__contains__)


def bring_to_schedule(checkpoint: dict, runner) -> None:
    """Gives a checkpoint that a run is resumed from the state of a schedule that the run now has.

    MMEngine puts the schedule of the checkpoint back, milestones, warm-up and all, in place of the config's. Here the
    config's is run through to where the checkpoint is, as if it had been in force from the start, with the learning
    rate of the config for the batch of now. Epochs of another length than the checkpoint's, as with another batch or
    number of processes, change the count of iterations.

    Args:
        checkpoint: Changed in place.
        runner: A runner that has built its schedulers and has not loaded the checkpoint yet.

    Raises:
        UserError: The schedule depends on figures of the run so far.
    """
    meta = checkpoint["meta"]
    epoch_length = max(1, len(runner.train_dataloader))
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        meta["iter"] = meta["epoch"] * epoch_length
    schedulers, groups = runner.param_schedulers or [], runner.optim_wrapper.param_groups
    if isinstance(schedulers, dict) or any("metrics" in signature(one.step).parameters for one in schedulers):
        raise UserError(
            "param_scheduler: a schedule of several optimisers, or one that depends on results, cannot be changed or "
            "continued with another batch; start a new run from the weights with --cfg-options load_from=CKPT"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `scheduler.step")
        for iteration in range(1, meta["iter"] + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch or (
                    iteration % epoch_length == 0 and iteration <= meta["epoch"] * epoch_length
                ):
                    scheduler.step()
    checkpoint["param_schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
    names = {scheduler.param_name for scheduler in schedulers} | {"lr"}
    optimizer = checkpoint["optimizer"]
    base = [optimizer["base_param_settings"]] if "base_param_settings" in optimizer else []  # what the log shows
    for saved, group in zip(optimizer["param_groups"] + base, groups, strict=True):
        saved |= {key: value for key, value in group.items() if key.removeprefix("initial_") in names}
