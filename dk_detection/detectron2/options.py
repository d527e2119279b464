"""Settings of the command line for configs of Detectron2, none of which is ignored in silence."""

import difflib
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig

from dk_detection.config_files import check_setting
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

    def target(place: str, node: DictConfig) -> list:
        given = (value for name, _, value in (one.partition("=") for one in options) if name == f"{place}._target_")
        found = next(given, node.get("_target_"))
        found = locate(found) if isinstance(found, str) else found
        return [found] if callable(found) else []

    for option in options:
        try:
            key, equals, _ = option.lstrip("+").partition("=")
            if not equals:
                raise UserError("expected key=value")
            if (name := key.partition(".")[0]) not in keys:
                raise UserError(_no_setting(cfg, name, keys))
            if not check_setting(cfg, key, target):
                print(f"{key} is new in this config", flush=True)
            cfg = LazyConfig.apply_overrides(cfg, [option])
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
        except Exception as error:
            raise UserError(f"{option}: expected key=value ... ({first_line(error)})") from error
    return cfg


def _no_setting(cfg: DictConfig, name: str, keys: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, keys, 1, 0.7)
    what = "a variable, from which the config has made its settings already" if name in cfg else "no setting"
    return f"{name} is {what}" + (f"; did you mean {close[0]}?" if close else "")


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
        raise UserError(f"{' '.join(options)}: expected KEY VALUE ... ({first_line(error)}){meant}") from error


def _keys(cfg: CfgNode, place: str) -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{place}{key}.")
        else:
            yield place + key


def first_line(error: Exception) -> str:
    """The kind of an error and what it says first; torch begins with a heading where it lists what is wrong."""
    heading, _, rest = str(error).strip().partition("\n")
    text = rest.strip().partition("\n")[0] if heading.startswith("Error(s) in loading state_dict") else heading
    return f"{type(error).__name__}: {text}"
