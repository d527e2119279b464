"""The arrows between the rooms of the house, and what works where a part of it is missing."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from docs.rooms import PACKAGE, imports, room_of, sources

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {"mmdet", "mmpretrain", "mmseg", "mmcv", "mmengine", "detectron2"}

_KERNELS = {"_extension", "ops", "layers", "convert", "backbones"}
_PLAIN = {"reference", "mimicking", "evaluation", "visualization", "datasets"}
_COMMAND_LINES = {"errors", "config_files", "checkpoint_names", "complexity"}

# What each room may import of the others. Those of _PLAIN see nothing of the compiled side, and not each other.
ARROWS = {
    "__init__": {
        "convert"
    },  # when to_deformable is first used; that importing the package loads nothing is tested below
    "__main__": {"config_files"},
    "_extension": {"_C", "errors"},
    "ops": {"_extension"},
    "onnx": {"ops"},
    "layers": {"_extension", "ops"},
    "convert": {"_extension", "ops", "layers"},
    "backbones": {"_extension", "ops", "layers", "convert"},
    "errors": set(),
    "complexity": _KERNELS | {"errors"},
    **{room: {"errors"} for room in _PLAIN},
    "config_files": {"errors"},
    "checkpoint_names": {"errors"},
    "mmengine": _KERNELS | {"config_files", "datasets", "errors", "visualization"},
    "mmdet": _KERNELS | _PLAIN | _COMMAND_LINES | {"mmengine"},
    "detectron2": _KERNELS | _PLAIN | _COMMAND_LINES,
}
# The adapters are the only rooms that know a framework, each its own.
ADAPTERS = {"mmengine": {"mmengine"}, "mmdet": {"mmdet", "mmcv", "mmengine"}, "detectron2": {"detectron2"}}


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    if room not in ARROWS:
        return [f"{module}: no arrows are drawn for {room}; add it to ARROWS"]
    found = []
    for line, name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top == PACKAGE:
            other = room_of(name)
            # The package's own __init__ may be imported by all; it holds nothing but lazy names.
            wrong = other in ARROWS.keys() | {"_C"} and other not in ARROWS[room] | {room, "__init__"}
        else:
            wrong = top in {"tests", "benchmarks", "tools"} or top in FRAMEWORKS - ADAPTERS.get(room, set())
        if wrong:
            found.append(f"{module}:{line}: {room} must not import {name}")
    return found


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("dk_detection.ops.x", "from dk_detection import _extension\nfrom dk_detection.ops import y\nimport torch", 0),
        ("dk_detection.ops.x", "from dk_detection.layers import table", 1),
        ("dk_detection.ops.x", "def f():\n    import mmcv.ops", 1),
        ("dk_detection.ops.x", "from dk_detection import _C", 1),
        ("dk_detection.ops.x", "from .. import layers, _extension", 1),
        ("dk_detection.layers.x", "from ..ops.y import z", 0),
        ("dk_detection.layers.x", "from ..convert import z", 1),
        ("dk_detection.reference.x", "import importlib\nimportlib.import_module('dk_detection.ops')", 1),
        ("dk_detection.datasets.x", "from dk_detection.reference import y", 1),
        ("dk_detection.mmdet.x", "import mmdet, mmcv\nfrom dk_detection import mimicking, to_deformable", 0),
        ("dk_detection.mmdet.x", "import detectron2\nfrom dk_detection.detectron2 import y", 2),
        ("dk_detection.mmengine.x", "import mmengine\nfrom dk_detection.mmdet import y\nimport mmpretrain", 2),
        ("dk_detection.detectron2.x", "import mmengine\nimport tests.ops.suite\nfrom benchmarks import common", 3),
        ("dk_detection.attic.x", "", 1),
    ],
)
def test_arrow_check(module, source, wrong):
    assert len(violations(source, module)) == wrong


def test_imports_follow_the_arrows():
    modules = list(sources())
    assert modules
    found = [violation for module in modules for violation in violations(*module)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["tools", "configs"])
def test_nothing_imports_tests_or_benchmarks(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        for line, name in imports(file.read_text(encoding="utf-8"), file.stem, is_package=False):
            assert name.split(".")[0] not in {"tests", "benchmarks"}, f"{file.relative_to(ROOT)}:{line} imports {name}"


def run_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr


def test_package_imports_without_the_compiled_library():
    run_python("""
        import sys
        sys.modules["dk_detection._C"] = None  # every import of it fails
        import dk_detection
        heavy = {"mmdet", "mmcv", "mmengine", "detectron2", "cv2", "torch"} & sys.modules.keys()
        assert not heavy, f"import dk_detection loads {heavy}"

        import torch
        from dk_detection import convert, layers, ops, reference
        image, offset, weight = torch.rand(1, 2, 5, 6), torch.zeros(1, 18, 3, 4), torch.rand(4, 2, 3, 3)
        reference.deform_conv2d(image, offset, weight)
        module = layers.DeformConv2d(2, 4, 3)
        for call in (lambda: ops.deform_conv2d(image, offset, weight), lambda: module(image)):
            try:
                call()
            except RuntimeError as error:
                assert "deform_conv2d" in str(error) and "pip install --no-build-isolation -e ." in str(error), error
            else:
                raise AssertionError("the call did not fail")
    """)


def test_layers_work_without_a_framework():
    run_python("""
        import sys
        for framework in ("mmdet", "mmcv", "mmengine", "detectron2", "fvcore"):
            sys.modules[framework] = None
        import torch
        import dk_detection
        from dk_detection.backbones import MobileNetV2
        from dk_detection.layers import ModulatedDeformConv2d
        network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Conv2d(3, 4, 3))
        names = dk_detection.to_deformable(network, ModulatedDeformConv2d, select=lambda name, conv: name == "2")
        assert names == ["2"] and isinstance(network[2], ModulatedDeformConv2d), names
        network(torch.rand(1, 2, 7, 8)).sum().backward()
        assert len(MobileNetV2()(torch.rand(1, 3, 64, 64))) == 4
    """)


def test_backbones_without_torchvision_say_so():
    run_python("""
        import sys
        sys.modules["torchvision"] = None
        try:
            import dk_detection.backbones
        except ImportError as error:
            assert str(error).startswith("dk_detection.backbones builds on torchvision's models"), error
        else:
            raise AssertionError("the import did not fail")
    """)
