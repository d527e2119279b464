"""What the build is told about the sources, and what a wheel holds."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build() -> dict:
    """What setuptools would do, without doing it."""
    code = """if True:
        import json
        import setuptools
        from distutils.core import run_setup
        distribution = run_setup("setup.py", stop_after="init")
        distribution.parse_config_files()
        (extension,) = distribution.ext_modules
        modules = distribution.get_command_obj("build_py")
        modules.ensure_finalized()
        data = [f"{source}/{name}" for _, source, _, names in modules.data_files for name in names]
        python = [path for _, _, path in modules.find_all_modules()]
        print(json.dumps(dict(
            sources=extension.sources, depends=extension.depends, files=data + python,
            commands=distribution.entry_points["console_scripts"],
        )))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"DK_DETECTION_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_file_of_csrc_is_compiled_or_makes_the_library_be_built_again(build):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    found = (*build["sources"], *build["depends"])
    assert {path.removeprefix(f"{ROOT.as_posix()}/") for path in found} == {
        path for path in files if not path.endswith(".cu")
    }
    assert any(path.endswith(".cuh") for path in build["depends"])


def test_a_wheel_holds_the_configs_and_the_tools(build):
    """Where MMEngine and Detectron2 look for those of a package."""
    places = {
        "configs/mmdet": "dk_detection/mmdet/.mim/configs",
        "configs/mmpretrain/deformed_shapes": "dk_detection/.mim/mmpretrain/deformed_shapes",
        "configs/mmseg": "dk_detection/.mim/mmseg",
        "configs/imagenet": "dk_detection/.mim/mmpretrain/imagenet",
        "configs/detectron2": "dk_detection/detectron2/configs",
        "tools": "dk_detection/.mim/tools",
    }
    expected = {"dk_detection/mmdet/.mim/model-index.yml"}
    for folder, place in places.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
        assert files
        expected |= {f"{place}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    expected -= {f"dk_detection/.mim/tools/{name}.py" for name in ("gpu_check", "make_zoo")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dk_detection").rglob("*.py")}
    assert set(build["files"]) == expected | modules


def test_commands_are_functions(build):
    for command in build["commands"]:
        module, function = command.split("=")[1].strip().split(":")
        assert callable(getattr(import_module(module), function))
