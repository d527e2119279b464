"""Reads checkpoints with care: whether they are whole, fit the model, and belong to the run that is to continue."""

import os
from collections.abc import Iterator

import torch
from mmengine.config import Config
from mmengine.runner import load_state_dict
from torch import nn

from dk_detection.errors import UserError

# What makes a run what it is. A run may go on with another work folder, length, log or launcher.
_IDENTITY = (
    "model",
    "train_dataloader.dataset",
    "train_dataloader.batch_size",
    "val_dataloader.dataset",
    "optim_wrapper.optimizer",
    "optim_wrapper.paramwise_cfg",
)
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


def check_same_run(cfg: Config, checkpoint: dict, path: str) -> None:
    """Checks that a checkpoint comes from a run with the same model, data and optimiser as the config's.

    Raises:
        UserError: It does not; the message names the first settings that differ.
    """
    try:
        theirs = Config.fromstring(checkpoint["meta"]["cfg"], ".py").to_dict()
    except Exception as error:
        raise UserError(f"{path}: the config that the checkpoint was trained with cannot be read ({error})") from error
    ours = cfg.to_dict()
    found = [difference for key in _IDENTITY for difference in _differences(key, _get(theirs, key), _get(ours, key))]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{path} belongs to the run of another config; they differ in {'; '.join(found[:3])}{more}. Choose another "
            "--work-dir, or the config and options of that run"
        )


def _get(settings: dict, key: str):
    for part in key.split("."):
        settings = (settings or {}).get(part)
    return settings


def _differences(key: str, theirs, ours) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted((theirs.keys() | ours.keys()) - _IRRELEVANT):
            yield from _differences(f"{key}.{name}", theirs.get(name), ours.get(name))
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(theirs) == len(ours):
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            yield from _differences(f"{key}[{i}]", a, b)
    elif theirs != ours and not _same_path(theirs, ours):
        yield f"{key} ({_short(theirs)} there, {_short(ours)} here)"


def _same_path(a, b) -> bool:
    return isinstance(a, str) and isinstance(b, str) and os.path.realpath(a) == os.path.realpath(b)


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
