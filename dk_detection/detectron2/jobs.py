"""A config of Detectron2, YAML or LazyConfig, with one face for all who run it; and how processes are started."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pydoc import locate
from urllib.error import URLError

import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from dk_detection.config_files import is_lazy_config, select
from dk_detection.detectron2.config import network_of, read_config, unread_keys
from dk_detection.detectron2.options import first_line, override_lazy, override_yaml
from dk_detection.detectron2.tta import check_tta, tta_of_lazy_config, tta_of_yaml
from dk_detection.errors import UserError

# What a LazyConfig has to set for a run.
_LAZY_KEYS = {
    **dict.fromkeys(("model", "dataloader", "train", "optimizer", "lr_multiplier"), DictConfig),
    **dict.fromkeys(("train.amp", "train.ddp", "train.checkpointer"), DictConfig),
    **dict.fromkeys(("train.device", "train.output_dir"), str),
    **dict.fromkeys(("train.max_iter", "train.eval_period", "train.log_period"), int),
    "train.amp.enabled": bool,
}
# The branch of DkMimicRCNN, without effect on predictions: a detector with it and one without are the same.
_TRAINING_ONLY = "mimic.classifier."


def start(main: Callable, arguments: tuple, num_gpus: int, machines: int = 1, rank: int = 0, url="auto") -> None:
    """Calls `main(*arguments)` in as many processes as asked for; under torchrun this one is one of many already.

    Raises:
        UserError: One of the processes raises it.
    """
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if has_gpu else "gloo")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        return main(*arguments)
    try:
        launch(main, num_gpus, machines, rank, url, arguments)
    except ProcessRaisedException as error:  # of several processes; it holds the text of the first one's traceback
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
        kind = locate(kind)
        if not (isinstance(kind, type) and issubclass(kind, UserError)):
            raise
        raise UserError(message) from None


def load_job(path: str, options: Sequence[str] = ()) -> "YamlJob | LazyJob":
    """Loads a config.

    Args:
        path: The file.
        options: Settings that override the config's: KEY VALUE ... for YAML, key=value ... for a LazyConfig.

    Raises:
        UserError: The file cannot be loaded, or a setting would have no effect.
    """
    return (LazyJob if is_lazy_config(path) else YamlJob)(path, list(options))


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


class _Job:
    """What the jobs of both kinds have in common. `cfg` is the config, `path` its file."""

    def __init__(self, path: str, options: list[str]) -> None:
        self.path = path
        try:
            self.cfg = read_config(path)
        except Exception as error:
            raise UserError(f"{path}: the config cannot be loaded ({first_line(error)})") from error
        self._override(options)

    def prepare(self) -> "_Job":
        """Checks that the config sets what a run takes; without a GPU it is for the CPU."""
        self._check()
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"{self.path}: {self.device!r} is no device ({first_line(error)})") from error
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            self.device = "cpu"
        return self

    def last_checkpoint(self) -> str:
        """The last checkpoint in the output folder; "" where there is none."""
        return DetectionCheckpointer(nn.Module(), self.output_dir).get_checkpoint_file()

    def checkpoint(self, resume: bool) -> str:
        """What weights come from: the last checkpoint of a run that is resumed, else what the config names."""
        return (resume and self.last_checkpoint()) or self.weights

    def build_model(self, device: str) -> nn.Module:
        """The detector, with random weights.

        Raises:
            UserError: A setting of the config does not fit.
        """
        with building(f"{self.path}: the model"):
            return self._build(device)

    def predicting(self, tta: bool) -> list:
        """The settings that decide on predictions; `tta`: also those of test-time augmentation."""
        settings = self.settings()
        return [select(settings, key) for key in (*self._predicting, *(["tta"] if tta else []))]


class YamlJob(_Job):
    WEIGHTS = "MODEL.WEIGHTS {}"
    device, output_dir, weights, amp, num_workers = map(
        _Setting, ("MODEL.DEVICE", "OUTPUT_DIR", "MODEL.WEIGHTS", "SOLVER.AMP.ENABLED", "DATALOADER.NUM_WORKERS")
    )
    # What makes a run what it is, what it may go on with and should be told, and what decides on predictions.
    identity = ("MODEL", "INPUT", "DATASETS.TRAIN")
    from_here_on = ("SOLVER", "DATALOADER", "DATASETS.TEST")
    _predicting = ("MODEL", "INPUT", "TEST")

    def _override(self, options: list[str]) -> None:
        override_yaml(self.cfg, options)
        for key, reason in unread_keys(self.cfg):
            raise UserError(f"{self.path}: {key} has no effect, since {reason}")

    def _check(self) -> None:
        pass  # `get_cfg` has a default for everything

    def _build(self, device: str) -> nn.Module:
        self.device = device
        return build_model(self.cfg)

    def settings(self) -> dict:
        """The config as plain values."""
        return yaml.safe_load(self.cfg.dump())

    def mapper(self) -> DatasetMapper:
        """From an entry of a data set to what the detector takes."""
        return DatasetMapper(self.cfg, is_train=False)

    def augmented(self, model: nn.Module) -> nn.Module:
        """The detector with test-time augmentation."""
        return tta_of_yaml(self.cfg, model)

    def data(self) -> dict:
        """The arguments of `check_data`."""
        model = self.cfg.MODEL
        heads = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "DkMimicRCNN": "ROI_HEADS"}
        heads |= {"RetinaNet": "RETINANET"}
        head = heads.get(network_of(self.cfg))
        return dict(
            train=list(self.cfg.DATASETS.TRAIN),
            test=list(self.cfg.DATASETS.TEST),
            masks=model.MASK_ON,
            rle=self.cfg.INPUT.MASK_FORMAT == "bitmask",
            filter_empty=self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            num_classes={f"MODEL.{head}.NUM_CLASSES": model[head].NUM_CLASSES} if head else {},
        )


class LazyJob(_Job):
    WEIGHTS = "train.init_checkpoint={}"
    device, output_dir, weights, amp = map(
        _Setting, ("train.device", "train.output_dir", "train.init_checkpoint", "train.amp.enabled")
    )
    identity = ("model", "dataloader.train.dataset", "dataloader.train.mapper")
    from_here_on = ("lr_multiplier", "dataloader.train", "dataloader.test", "train.max_iter", "train.amp")
    _predicting = ("model", "dataloader.test.mapper")

    def _override(self, options: list[str]) -> None:
        keys = {key.partition(".")[0] for key in _LAZY_KEYS}
        self.cfg = override_lazy(self.cfg, options, keys | {"tta"})
        check_tta(self.cfg.get("tta") or {})

    def _check(self) -> None:
        for key, kind in _LAZY_KEYS.items():
            value = self._get(key)
            if not isinstance(value, kind):
                raise UserError(f"{self.path}: {key} is {value!r}, expected {kind.__name__}")

    def _build(self, device: str) -> nn.Module:
        return instantiate(self._get("model")).to(device)

    def _get(self, key: str):
        value = OmegaConf.select(self.cfg, key)
        if value is None:
            raise UserError(f"{self.path}: the config sets no {key}")
        return value

    def settings(self) -> dict:
        """The config as plain values; a function or a class is its name."""
        return _plain(OmegaConf.to_container(self.cfg, resolve=True))

    def mapper(self) -> DatasetMapper:
        """From an entry of a data set to what the detector takes."""
        return instantiate(self._get("dataloader.test.mapper"))

    def augmented(self, model: nn.Module) -> nn.Module:
        """The detector with test-time augmentation."""
        return tta_of_lazy_config(self.cfg.get("tta") or {}, model)

    @property
    def num_workers(self) -> int:
        return self.cfg.dataloader.test.get("num_workers", 0)

    def data(self) -> dict:
        """The arguments of `check_data`."""
        names = (OmegaConf.select(self.cfg, f"dataloader.{split}.dataset.names") or [] for split in ("train", "test"))
        train, test = ([value] if isinstance(value, str) else list(value) for value in names)
        loader = OmegaConf.select(self.cfg, "dataloader.train") or {}
        return dict(
            train=train,
            test=test,
            masks=bool(OmegaConf.select(loader, "mapper.use_instance_mask")),
            rle=OmegaConf.select(loader, "mapper.instance_mask_format") == "bitmask",
            filter_empty=OmegaConf.select(loader, "dataset.filter_empty") is not False,
            num_classes=dict(_num_classes(self.cfg.model, "model")),
        )


def _num_classes(node: DictConfig, place: str) -> Iterator[tuple[str, int]]:
    """The numbers of classes of a model's heads with their places; of others than boxes and masks they may differ."""
    for key, value in node.items():
        if isinstance(value, DictConfig) and key not in ("backbone", "sem_seg_head"):
            yield from _num_classes(value, f"{place}.{key}")
        elif key == "num_classes" and isinstance(value, int):
            yield f"{place}.{key}", value


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


class StrictCheckpointer(DetectionCheckpointer):
    """Loads a checkpoint that fits. Detectron2 warns of others, and their figures look like a bad result."""

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong = [f"{key} is {theirs}, expected {ours}" for key, theirs, ours in incompatible.incorrect_shapes]
        shapes = {key for key, *_ in incompatible.incorrect_shapes}  # they count as missing, too
        wrong += [f"{key} is missing" for key in incompatible.missing_keys if key not in shapes]
        wrong += [f"{key} is not in the model" for key in incompatible.unexpected_keys]
        if wrong := [text for text in wrong if not text.startswith(_TRAINING_ONLY)]:
            more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            raise UserError(f"the checkpoint does not fit the model of this config: {'; '.join(wrong[:2])}{more}")


@contextmanager
def building(what: str) -> Iterator[None]:
    """Says in one line why something cannot be built of the settings of a config."""
    try:
        yield
    except (AssertionError, ImportError, KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{what} cannot be built ({first_line(error)})") from error


@contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Says in one line why a checkpoint, a file or an address, cannot be loaded."""
    if checkpoint and "://" not in checkpoint and not os.path.isfile(checkpoint.partition("?")[0]):
        raise UserError(f"{checkpoint}: there is no such checkpoint")
    try:
        yield
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    except URLError as error:
        raise UserError(
            f"{checkpoint}: the weights could not be downloaded ({error.reason}); name a file of them, or train from "
            "random ones with MODEL.WEIGHTS '' (YAML) or train.init_checkpoint='' (LazyConfig)"
        ) from error
    except Exception as error:  # depending on where a file ends, nearly any; RuntimeError: a layer refuses its weights
        raise UserError(f"{checkpoint}: the checkpoint cannot be read ({first_line(error)})") from error


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Loads a checkpoint for predictions.

    Raises:
        UserError: It is not there, cannot be read, or is of another model.
    """
    with reading(checkpoint):
        StrictCheckpointer(model).load(checkpoint)
