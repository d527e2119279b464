"""Settings of the command line for configs of Detectron2, none of which is ignored in silence."""

import difflib
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig

from dk_detection.config_files import check_new_key
from dk_detection.errors import UserError


def override_lazy(cfg: DictConfig, options: list[str], keys: Iterable[str]) -> DictConfig:
    """Overrides settings of a LazyConfig.

    Args:
        cfg: The config. Changed in place.
        options: The settings, key=value, as Detectron2 takes them.
        keys: What is read of a config. All else at its top are variables, from which it has made its settings.

    Raises:
        UserError: A setting cannot be read, or would have no effect.
    """
    for option in options:
        try:
            key, equals, _ = option.lstrip("+").partition("=")
            if not equals:
                raise UserError("expected key=value")
            _check_lazy(cfg, key, options, keys)
            cfg = LazyConfig.apply_overrides(cfg, [option])
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
        except Exception as error:
            raise UserError(f"{option}: expected key=value ... ({_reason(error)})") from error
    return cfg


def _check_lazy(cfg: DictConfig, key: str, options: list[str], keys: Iterable[str]) -> None:
    names, place, node = key.split("."), "", cfg
    if names[0] not in keys:
        close = difflib.get_close_matches(names[0], keys, 1, 0.7)
        what = "is a variable, from which the config has made its settings" if names[0] in cfg else "is no setting"
        raise UserError(f"{names[0]} {what}" + (f"; did you mean {close[0]}?" if close else ""))
    for name in names:
        if isinstance(node, ListConfig):
            if not name.isdigit():
                raise UserError(f"{place} is a list, write {place}.0, {place}.1, ...")
            if int(name) >= len(node):
                raise UserError(f"{place} has {len(node)} elements, 0 to {len(node) - 1}")
            node = node[int(name)]
        elif isinstance(node, DictConfig):
            if name not in node:
                if place and name != "_target_":
                    given = (option.partition("=")[2] for option in options if option.startswith(f"{place}._target_="))
                    target = next(given, node.get("_target_"))
                    target = locate(target) if isinstance(target, str) else target
                    if not check_new_key(place, name, map(str, node), [target] if callable(target) else []):
                        print(f"{place}.{name} is new in this config", flush=True)
                return
            node = node[name]
        else:
            raise UserError(f"{place} is {node!r} and has no {name}; set it as a whole")
        place = f"{place}.{name}" if place else name


def override_yaml(cfg: CfgNode, options: list[str]) -> None:
    """Overrides settings of a YAML config.

    Args:
        cfg: The config. Changed in place.
        options: KEY VALUE ..., as Detectron2 takes them.

    Raises:
        UserError: A setting cannot be read, or does not exist.
    """
    try:
        cfg.merge_from_list(options)
    except Exception as error:
        unknown = [key for key in options[::2] if key not in set(_keys(cfg, ""))]
        close = difflib.get_close_matches(unknown[0], list(_keys(cfg, "")), 1, 0.6) if unknown else []
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{' '.join(options)}: expected KEY VALUE ... ({_reason(error)}){meant}") from error


def _keys(cfg: CfgNode, place: str) -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{place}{key}.")
        else:
            yield place + key


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
