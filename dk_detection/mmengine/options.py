"""Loads a config of MMEngine with settings of the command line, none of which is ignored in silence."""

import argparse
import difflib
import importlib
import inspect
import shlex
from collections.abc import Iterator

import mmengine.registry
from mmengine.config import Config, DictAction
from mmengine.registry import Registry
from mmengine.runner import Runner

from dk_detection.config_files import check_setting
from dk_detection.errors import UserError

# What is read of a config when it is loaded: the arguments of the Runner, what it looks up in its config later, and
# test-time augmentation. All else are variables, from which a config has made its settings when it is loaded.
_SETTINGS = set(inspect.signature(Runner).parameters) - {"cfg"} | {
    "activation_checkpointing",
    "auto_scale_lr",
    "compile",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "runner_type",
    "sync_bn",
    "tta_model",
    "tta_pipeline",
}
# Which extra of ours installs a framework, by the name that MMEngine says is not installed.
_EXTRAS = {"mmdet": "mmdet", "mmpretrain": "classification", "mmsegmentation": "segmentation"}
# What configs set before there was MMEngine, those of MMDetection 2 for example.
_BEFORE_MMENGINE = ("data", "optimizer", "optimizer_config", "lr_config", "runner", "total_epochs", "checkpoint_config")


def load_config(path: str, options: list[str] | None = None) -> Config:
    """Loads a config of MMEngine and overrides some of its settings.

    Args:
        path: The file.
        options: The settings, KEY=VALUE.

    Raises:
        UserError: A file of it cannot be loaded, or a setting would have no effect.
    """
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        cause = error  # of an import the last that says more than that there is no such module
        while type(cause) is type(inner := cause.__cause__ or cause.__context__) is ImportError:
            cause = inner
        reason = f"{type(cause).__name__}: {_first_line(cause)}"
        for package, extra in _EXTRAS.items():
            if f"{package} is not installed" in reason:
                reason = (
                    f"{package} is not installed: in the project's folder run `make setup` or `pip install "
                    f"--no-build-isolation -e '.[{extra}]'`"
                )
        raise UserError(f"{path}: the config cannot be loaded ({reason})") from error
    old = [key for key in _BEFORE_MMENGINE if key in cfg]
    if old and "train_dataloader" not in cfg and "test_dataloader" not in cfg:
        raise UserError(
            f"{path} is a config from before MMEngine, such as one of MMDetection 2 (it sets {', '.join(old)}): "
            "https://mmdetection.readthedocs.io/en/latest/migration/config_migration.html tells how to bring it over"
        )
    for option in options or ():
        if "=" not in option:
            raise UserError(f"--cfg-options {shlex.quote(option)}: expected KEY=VALUE")
    settings = {}
    for option in options or ():
        parser = argparse.ArgumentParser()
        parser.add_argument("--cfg-options", nargs="+", action=DictAction)
        try:
            settings |= parser.parse_args(["--cfg-options", option]).cfg_options
        except Exception as error:
            raise UserError(
                f"--cfg-options {shlex.quote(option)}: the value cannot be read ({_first_line(error)})"
            ) from error

    def functions_of(place: str, node: dict) -> list:
        return _functions(settings.get(f"{place}.type", node.get("type")), cfg.get("default_scope"))

    for key, value in settings.items():
        names = key.split(".")
        try:
            if names[0] not in _SETTINGS:
                raise UserError(_no_setting(cfg, names))
            if not check_setting(cfg.to_dict(), key, functions_of):
                print(f"--cfg-options {key}: the config does not have it so far", flush=True)
            cfg.merge_from_dict({key: value})
        except UserError as error:
            raise UserError(f"--cfg-options {key}={value}: {error}") from None
        except Exception as error:
            raise UserError(f"--cfg-options {key}={value}: {_first_line(error)}") from error
    return cfg


def _no_setting(cfg: Config, names: list[str]) -> str:
    """Why something at the top of a config is no setting, and which was meant."""
    if names[0] not in cfg:
        close = difflib.get_close_matches(names[0], _SETTINGS | cfg.keys(), 1, 0.7)
        return f"there is no setting {names[0]}" + (f"; did you mean {close[0]}?" if close else "")
    settings = {key: value for key, value in cfg.to_dict().items() if key in _SETTINGS}
    places = [".".join([place, *names[1:]]) for place in _places(cfg.to_dict()[names[0]], settings, "")]
    meant = f": write {', '.join(places[:4])}{', ...' if len(places) > 4 else ''}" if places else ""
    return f"{names[0]} is a variable, from which the config has made its settings already{meant}"


def _places(value, node, place: str) -> Iterator[str]:
    """Where in some settings a value is, or one that was made from it by adding to it."""
    if place and _is_made_from(node, value):
        yield place
    elif isinstance(node, (dict, list, tuple)):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _places(value, inner, f"{place}.{key}" if place else str(key))


def _is_made_from(node, value) -> bool:
    if isinstance(value, dict):
        keys = value.keys() - {"_scope_"}  # MMEngine's own
        return isinstance(node, dict) and all(key in node and _is_made_from(node[key], value[key]) for key in keys)
    if isinstance(value, (list, tuple)):
        return type(node) is type(value) and len(node) == len(value) and all(map(_is_made_from, node, value))
    return type(node) is type(value) and node == value


def _functions(kind, scope: str | None) -> list:
    """What a `type` may stand for. Each kind of thing has a registry, and names may be in several."""
    if callable(kind):
        return [kind]
    if not isinstance(kind, str):
        return []
    try:
        registries = importlib.import_module(f"{scope}.registry")  # where MMEngine looks for a framework's, too
    except ImportError:
        registries = mmengine.registry
    found = (one.get(kind) for one in vars(registries).values() if isinstance(one, Registry))
    return [function for function in dict.fromkeys(found) if function is not None]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
