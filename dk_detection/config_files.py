"""What configs of MMEngine and of Detectron2 have in common: whose a file is, and whether a setting means anything.

The framework is told from the text alone; nothing is imported or run for it.
"""

import ast
import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dk_detection.errors import UserError

MMENGINE, DETECTRON2 = "mmengine", "detectron2"
PACKAGE = Path(__file__).parent
# The configs of this project, which are part of the package: where each framework's own packages have theirs.
FOLDERS = {
    "mmdet": PACKAGE / "mmdet" / ".mim" / "configs",
    "mmpretrain": PACKAGE / ".mim" / "mmpretrain",
    "mmseg": PACKAGE / ".mim" / "mmseg",
    DETECTRON2: PACKAGE / "detectron2" / "configs",
}
_SUFFIXES = (".py", ".json", ".yaml", ".yml")

_MMENGINE_NAMES = {"_base_", "default_scope", "custom_imports"}
_DETECTRON2_PACKAGES = ("detectron2", "omegaconf", "fvcore", "dk_detection.detectron2")
# Detectron2's own YAML has keys in capitals; its LazyConfigs, saved as YAML, name what to call.
_LAZY_YAML = re.compile(r"^\s*(- )?_target_\s*:", re.MULTILINE)
_DETECTRON2_YAML = re.compile(rf"^(_BASE_|[A-Z][A-Z0-9_]*)\s*:|{_LAZY_YAML.pattern}", re.MULTILINE)


def is_config_file(path: str | os.PathLike) -> bool:
    """Whether a file has the name of a config file."""
    return os.path.splitext(path)[1].lower() in _SUFFIXES


def shipped(framework: str, name: str) -> str:
    """The path of a config of this project.

    Args:
        framework: "mmdet", "mmpretrain", "mmseg" or "detectron2".
        name: Folder and file, "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py".

    Raises:
        UserError: There is none of this name.
    """
    path = FOLDERS[framework] / name
    if not path.is_file():
        close = difflib.get_close_matches(
            name, [f"{p.parent.name}/{p.name}" for p in FOLDERS[framework].glob("*/*")], 1
        )
        raise UserError(f"there is no config {name} for {framework}{f'; did you mean {close[0]}?' if close else ''}")
    return str(path)


def framework_of(path: str | os.PathLike) -> str:
    """The framework of a config file: Detectron2, or MMEngine, on which MMDetection and its like are built.

    A file of either framework can often be parsed by the other, with an empty or a wrong result and without an error,
    so this has to be known before the file is loaded.

    Args:
        path: A .py, .json, .yaml or .yml file.

    Returns:
        "mmengine" or "detectron2".

    Raises:
        UserError: The file is not there, cannot be read, or is not a config file.
    """
    if not is_config_file(path):
        raise UserError(f"{path}: a config file ends in .py, .json, .yaml or .yml")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the config file cannot be read ({error})") from error
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".json":
        return MMENGINE
    if suffix != ".py":
        return DETECTRON2 if _DETECTRON2_YAML.search(text) else MMENGINE
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path}{line}: the config file is not valid Python ({error.args[0]})") from error
    return DETECTRON2 if _is_lazy_python(tree) else MMENGINE


def is_lazy_config(path: str | os.PathLike) -> bool:
    """Whether a config file of Detectron2 is a LazyConfig, as Python or saved as YAML, and not plain YAML."""
    if os.path.splitext(path)[1].lower() == ".py":
        return True
    with open(path, encoding="utf-8") as file:
        return _LAZY_YAML.search(file.read()) is not None


def parameters_of(function: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of a class or a function, of a class also those that it hands on to its bases in **kwargs.

    Returns:
        The parameters by name, and whether there may be others that nobody can tell.
    """
    functions = [function]
    if inspect.isclass(function):
        functions = [vars(base)["__init__"] for base in function.__mro__ if "__init__" in vars(base)]
    found = {}
    for one in functions:
        parameters = inspect.signature(one).parameters
        found = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | found
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return found, False
    return found, True


def check_setting(cfg: Mapping, key: str, functions_of: Callable[[str, Mapping], list[Callable]]) -> bool:
    """Checks that a setting that the user gave has a place in a config.

    What calls functions with their settings takes those that are parameters. Elsewhere a new name that is nearly one
    that is there is taken for a slip.

    Args:
        cfg: The config: mappings and sequences.
        key: The place, "model.backbone.depth". Of a sequence it has the number.
        functions_of: Gives for a mapping and its place what the settings in it may be arguments of, if anything.

    Returns:
        Whether the setting is there, or something takes it for certain.

    Raises:
        UserError: It has no place.
    """
    place, node = "", cfg
    for name in key.split("."):
        if isinstance(node, Mapping):
            if name not in node:
                return not place or _check_new(place, name, node, functions_of(place, node))
            node = node[name]
        elif isinstance(node, Sequence) and not isinstance(node, str):
            if not name.isdigit():
                raise UserError(f"{place} is a list, write {place}.0, {place}.1, ...")
            if int(name) >= len(node):
                raise UserError(f"{place} has {len(node)} elements, 0 to {len(node) - 1}")
            node = node[int(name)]
        else:
            raise UserError(f"{place} is {node!r} and has no {name}; set it as a whole")
        place = f"{place}.{name}" if place else name
    return True


def select(settings, key: str):
    """The setting at a place, "model.backbone.depth"; None where there is none."""
    for name in key.split("."):
        settings = (settings or {}).get(name)
    return settings


def differences(theirs: Mapping, ours: Mapping, keys: Iterable[str], may_differ: Callable[[str], bool]) -> list[str]:
    """Where the settings of two runs differ, "model.backbone.depth (50 there, 18 here)".

    Args:
        theirs: The settings of one run: mappings, sequences and plain values.
        ours: Those of the other.
        keys: The places to look at, "model.backbone".
        may_differ: Whether settings of this name are passed over.
    """

    def compare(key: str, theirs, ours) -> Iterator[str]:
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            for name in sorted(theirs.keys() | ours.keys()):
                if not may_differ(name):
                    yield from compare(f"{key}.{name}", theirs.get(name), ours.get(name))
        elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(theirs) == len(ours):
            for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
                yield from compare(f"{key}[{i}]", a, b)
        elif theirs != ours and not _same_path(theirs, ours):
            yield f"{key} ({_short(theirs)} there, {_short(ours)} here)"

    return [text for key in keys for text in compare(key, select(theirs, key), select(ours, key))]


def _same_path(a, b) -> bool:
    return isinstance(a, str) and isinstance(b, str) and os.path.realpath(a) == os.path.realpath(b)


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_new(place: str, name: str, node: Mapping, functions: list[Callable]) -> bool:
    if name in ("type", "_target_", "_delete_", "_scope_"):
        return True
    signatures = [parameters_of(function) for function in functions]
    if any(name in parameters for parameters, _ in signatures):
        return True
    known = set(map(str, node)).union(*(parameters for parameters, _ in signatures)) - {"self"}
    close = difflib.get_close_matches(name, known, 1, 0.7)
    if close or (signatures and not any(is_open for _, is_open in signatures)):
        meant = f"; did you mean {place}.{close[0]}?" if close else ""
        raise UserError(f"there is no setting {place}.{name}{meant}")
    return False


def _is_lazy_python(tree: ast.Module) -> bool:
    for node in tree.body:
        if isinstance(node, ast.Assign) and _MMENGINE_NAMES & {getattr(target, "id", "") for target in node.targets}:
            return False
        if isinstance(node, ast.With) and "read_base()" in (ast.unparse(item.context_expr) for item in node.items):
            return False
    imports = [
        name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for name in _imported(node)
    ]
    if any(f"{name}.".startswith(f"{package}.") for name in imports for package in _DETECTRON2_PACKAGES):
        return True
    if any(name.startswith(("mm", "dk_detection.mm")) for name in imports):
        return False
    return any(name.startswith(".") for name in imports)


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = "." * node.level + (node.module or "")
    return [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
