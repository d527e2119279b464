"""The framework of a config file is known before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from dk_detection.config_files import framework_of, shipped
from dk_detection.errors import UserError

CASES = {
    # MMEngine, text
    "base.py": ("_base_ = ['a.py', 'mmdet::b.py']", "mmengine"),
    "nothing imported.py": ("model = dict(type='FasterRCNN')\nx = 3 * [1]", "mmengine"),
    "empty.py": ("", "mmengine"),
    "scope.py": ("default_scope = 'mmdet'\nimport os", "mmengine"),
    "annotated.py": ("x: int = 1\ncustom_imports = dict(imports=['detectron2.layers'])", "mmengine"),
    "chained.py": ("a = _base_ = 'b.py'", "mmengine"),
    # MMDetection's wrapper around Detectron2's models
    "wrapper.py": ("_base_ = '../common.py'\nimport detectron2.config", "mmengine"),
    # MMEngine, new style
    "read_base.py": (
        "from mmengine.config import read_base\nwith read_base():\n    from .._base_.default_runtime import *",
        "mmengine",
    ),
    "lazy types.py": ("from mmdet.models import ResNet\nmodel = dict(type=ResNet)", "mmengine"),
    "mmengine.py": ("import mmengine.hooks\nx = 1", "mmengine"),
    "our adapter.py": ("from dk_detection.mmdet import DkDeformable", "mmengine"),
    # MMEngine, other formats
    "plain.json": ('{"model": {}}', "mmengine"),
    "plain.yaml": ("_base_: a.yaml\nmodel:\n  type: FasterRCNN", "mmengine"),
    "nested capitals.yml": ("model:\n  TYPE: X", "mmengine"),
    # Detectron2, YAML
    "faster_rcnn.yaml": ('_BASE_: "../Base-RCNN-FPN.yaml"\nMODEL:\n  MASK_ON: False', "detectron2"),
    "keys.yaml": ("# a comment\nSOLVER:\n  STEPS: !!python/tuple [1, 2]", "detectron2"),
    "saved lazy.yaml": ("model:\n  _target_: detectron2.modeling.GeneralizedRCNN", "detectron2"),
    "saved lazy list.yml": ("hooks:\n- _target_: a.b", "detectron2"),
    # Detectron2, LazyConfig
    "lazy.py": ("from detectron2.config import LazyCall as L\nmodel = L(object)()", "detectron2"),
    "omega.py": ("from omegaconf import OmegaConf", "detectron2"),
    "fvcore.py": ("import fvcore.common.param_scheduler as s", "detectron2"),
    "relative.py": ("from ..common.coco import dataloader\nfrom .model import model", "detectron2"),
    "zoo.py": ("def f():\n    from detectron2 import model_zoo\n    return model_zoo", "detectron2"),
    "our other adapter.py": ("from dk_detection.detectron2 import x", "detectron2"),
    "our other adapter, short.py": ("from dk_detection import detectron2", "detectron2"),
    "both.py": ("import mmcv\nimport detectron2", "detectron2"),
    # only looks like it
    "similar name.py": ("import detectron2000\nimport mmh3", "mmengine"),
}


@pytest.mark.parametrize(
    ("name", "text", "framework"), [(name, *case) for name, case in CASES.items()], ids=CASES.keys()
)
def test_framework(tmp_path, name, text, framework):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert framework_of(path) == framework
    assert framework_of(str(path)) == framework


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.py", None, "missing.py: there is no such config file"),
        ("weights.pth", b"", "weights.pth: a config file ends in .py, .json, .yaml or .yml"),
        (
            "broken.py",
            b"model = dict(\nx = 1",
            r"broken.py, line 1: the config file is not valid Python \(.* was never",
        ),
        ("null.py", b"a = 1\0", "null.py.*: the config file is not valid Python"),
        ("latin.py", "a = 'é'".encode("latin-1"), "latin.py: the config file cannot be read"),
        ("folder.py", "folder", "folder.py: the config file cannot be read"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        framework_of(path)
    assert "\n" not in str(error.value)


def test_configs_of_the_installed_mmdet_are_recognised():
    mmdet = pytest.importorskip("mmdet")
    root = Path(mmdet.__file__).parent
    files = [*(root / ".mim" / "configs").rglob("*.py"), *(root / "configs").rglob("*.py")]
    assert len(files) > 500
    assert [file for file in files if framework_of(file) != "mmengine"] == []


def test_no_framework_is_needed():
    code = "import sys, dk_detection.config_files; print({'torch', 'mmengine', 'yaml'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("framework", "name", "whose"),
    [
        ("mmdet", "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_16e_coco.py", "mmengine"),
        ("mmpretrain", "imagenet/r50-dw-dk_90e_imagenet.py", "mmengine"),
        ("detectron2", "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_16e_coco.py", "detectron2"),
    ],
)
def test_configs_of_this_project(framework, name, whose):
    assert framework_of(shipped(framework, name)) == whose
    with pytest.raises(UserError, match=rf"no config {name[:-3]} for {framework}; did you mean {name}"):
        shipped(framework, name[:-3])


def test_get_config_reads_both_kinds():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dk_detection.detectron2 import get_config

    assert "model" in get_config("dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_mdpool_16e_coco.py")
    assert get_config("dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.yaml").MODEL.META_ARCHITECTURE == "DkDeformable"
