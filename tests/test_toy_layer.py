"""A layer added as docs/adding_an_operator.md says, by its file and its row, works wherever layers do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, snippets

PAGE = ROOT / "docs" / "adding_an_operator.md"
CODE = """
import runpy, sys
import torch, torchvision
from dk_detection import to_deformable
from dk_detection.layers.scaled_conv2d import ScaledConv2d
from tests import stems

assert stems.parse("faster-rcnn_r50-sconv-c3-c5_fpn_1x_coco").layer(3, stage=4) is ScaledConv2d

net = torchvision.models.resnet18().eval()
rigid = {name: value.clone() for name, value in net.state_dict().items()}
x = torch.randn(2, 3, 64, 64)
before = net(x)
names = to_deformable(net, "sconv", select="layer[34].*.conv2", max_scale=2.0)
assert len(names) == 4 and all(type(net.get_submodule(name)) is ScaledConv2d for name in names)
assert (net(x) - before).abs().max() <= 1e-5 * before.abs().max()
net.load_state_dict(rigid)
net(x).square().sum().backward()
torch.optim.SGD(net.parameters(), lr=0.01).step()
layer = net.layer3[0].conv2
assert layer.scale.weight.ne(0).any() and layer.max_scale == 2
conv = torch.nn.Conv2d(4, 4, 3).requires_grad_(False)
assert not any(parameter.requires_grad for parameter in ScaledConv2d.from_rigid(conv).parameters())

# One output position and one tap on each side: a scale of 1 doubles the distance, and the borders fall off the map.
layer = ScaledConv2d(1, 1, (1, 3), padding=(0, 1), bias=False)
torch.nn.init.ones_(layer.weight)
torch.nn.init.ones_(layer.scale.bias)
assert layer(torch.arange(1.0, 8).view(1, 1, 1, 7)).flatten().tolist() == [4, 6, 9, 12, 15, 10, 12]

sys.argv = ["complexity.py", "--backbone", "resnet18", "--exchange", "sconv:max_scale=2.0", "layer[34].*.conv2"]
sys.path.insert(0, "tools")
runpy.run_path("tools/complexity.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with the page's file and row."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("dk_detection", "configs", "tests", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    file, row = [snippet.text for snippet in snippets(PAGE) if snippet.language == "python"]
    layers = copy / "dk_detection" / "layers"
    (layers / "scaled_conv2d.py").write_text(file, encoding="utf-8")
    line, row = row.split("\n\n")
    table = (layers / "table.py").read_text(encoding="utf-8")
    table = table.replace("\n\n\n@dataclass", f"\n{line}\n\n\n@dataclass")
    head, end, tail = table.rpartition("\n)\n")
    table = f"{head}\n{row.rstrip()},{end}{tail}"
    (layers / "table.py").write_text(table, encoding="utf-8")
    return copy


def run(project: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_plain_torch_and_complexity(project):
    counted = run(project, "-c", CODE)
    # 4 branches of 9 * 256 or 9 * 512 weights and a bias; torchvision's ResNet-18 has 11.69 million.
    assert re.search(r"total +\| +11\.70 \|", counted), counted


def test_what_is_tested_for_every_row(project):
    """In MMDetection, in Detectron2 where it is installed, from one to the other, and on the meta device."""
    tests = ("mmdet/test_registration.py", "detectron2", "layers/test_meta_device.py")
    passed = run(project, "-m", "pytest", "-q", "-k", "sconv", *(f"tests/{path}" for path in tests))
    assert re.search(r"\d passed", passed), passed
