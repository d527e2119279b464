"""The command line: what it prints, and what it says about wrong arguments."""

import re
import subprocess
import sys
from pathlib import Path

import complexity as tool
import paper_tables
import pytest

from dk_detection.complexity.backbones import count_backbone
from dk_detection.complexity.counting import format_parts
from tests.tools.command_line import without

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "configs" / "mmdet" / "deformed_shapes" / "mask-rcnn_r18_fpn_1k_deformed-shapes.py"


def run(capsys, *argv):
    try:
        code = tool.run(tool.main, list(map(str, argv)))
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_config(capsys):
    code, out, err = run(capsys, "--config", SMALL, "--shape", 64, 96, "--rois", 5)
    assert (code, err) == (0, "")
    header, _, *lines = out.splitlines()
    assert cells(header) == ["part", "#P (M)", "GFLOPs"]
    assert [cells(line)[0] for line in lines] == ["backbone", "neck", "RPN", "box head", "mask head", "total"]
    *parts, whole = ([float(cell) for cell in cells(line)[1:]] for line in lines)
    for column, value in enumerate(whole):
        assert value == pytest.approx(sum(part[column] for part in parts), abs=0.03)


@pytest.mark.parametrize("kind", ["py", "yaml"])
def test_config_of_detectron2(capsys, kind):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    name = {"py": "mask-rcnn_r50_fpn_16e_coco.py", "yaml": "mask-rcnn_r50_fpn_1x_coco.yaml"}[kind]
    code, out, _ = run(capsys, "--config", ROOT / "configs" / "detectron2" / "dcnv2" / name, "--shape", 64, 96)
    assert code == 0
    names = [cells(line)[0] for line in out.splitlines()[2:]]
    assert names == ["backbone", "RPN", "box head", "mask head", "total"]


def test_detectron2_is_not_installed(capsys, monkeypatch):
    for name in [name for name in sys.modules if f"{name}.".startswith(("detectron2.", "dk_detection.detectron2."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    config = ROOT / "configs" / "detectron2" / "dcnv2" / "mask-rcnn_r50_fpn_16e_coco.py"
    code, out, err = run(capsys, "--config", config)
    assert (code, out) == (1, "")
    assert re.match(r"complexity.py: dk_detection.detectron2 needs Detectron2 .* Install it as", err)
    assert len(err.splitlines()) == 1


def test_backbone(capsys):
    code, rigid, err = run(capsys, "--backbone", "mobilenet-v2")
    assert (code, err) == (0, "")
    assert cells(rigid.splitlines()[-1]) == ["total", "3.50", "0.30"]
    options = ("--backbone", "mobilenet-v2", "--shape", 64, 96)
    exchange = ("--exchange", "dk:scope_size=5", "features.1[4-7].conv.1.0", "--exchange", "gdk", "features.18.0")
    code, out, err = run(capsys, *options, *exchange)
    assert (code, err) == (0, "")
    assert out != run(capsys, *options)[1]
    layers = [
        dict(layer="dk", select="features.1[4-7].conv.1.0", scope_size=5),
        dict(layer="gdk", select="features.18.0"),
    ]
    assert out.strip() == format_parts(count_backbone("mobilenet-v2", (64, 96), layers))


def test_table_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(paper_tables, "CLASSIFIERS", paper_tables.CLASSIFIERS[:2])
    code, out, err = run(capsys, "--table", "dk")
    assert code == 0
    assert [cells(line)[0] for line in out.splitlines()[2:4]] == ["resnet50", "resnet50-dw"]
    assert err.splitlines() == ["1/2 resnet50, 1x1 -, 3x3 -", "2/2 resnet50-dw, 1x1 -, 3x3 -"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "one of the arguments --config --backbone --table is required"),
        (("--config", SMALL, "--backbone", "resnet18"), "argument --backbone: not allowed with argument --config"),
        (("--table", "dkn"), "argument --table: invalid choice: 'dkn'"),
        (("--table", "dk", "--shape", 224, 224), "--shape does not go with --table dk"),
        (("--config", SMALL, "--exchange", "dk", "*"), "--exchange does not go with --config"),
        (("--backbone", "resnet18", "--rois", 5), "--rois does not go with --backbone"),
        (("--backbone", "resnet18", "--shape", 224), "argument --shape: expected 2 arguments"),
        (("--backbone", "resnet18", "--shape", 0, 224), "argument --shape: '0' must be a positive integer"),
        (
            ("--backbone", "resnet18", "--exchange", "dk:5", "*"),
            "argument --exchange: 'dk:5': write LAYER or LAYER:OPTION",
        ),
        (
            ("--backbone", "resnet50-dw", "--exchange", "dk:a=", "*"),
            "argument --exchange: 'dk:a=': write LAYER or LAYER:OPTION",
        ),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert re.match(f"complexity.py: {re.escape(message)}", err)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--config", "nowhere.py"), "nowhere.py: there is no such config file"),
        (("--backbone", "resnet50dw"), "there is no backbone 'resnet50dw'"),
        (
            ("--backbone", "resnet50-dw", "--exchange", "dcn", "*"),
            "resnet50-dw cannot be counted: no layer has the token 'dcn'",
        ),
        (
            ("--backbone", "resnet18", "--exchange", "dk", "layer9.*"),
            "resnet18 cannot be counted: to_deformable: select=",
        ),
    ],
)
def test_what_cannot_be_counted(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert err.startswith(f"complexity.py: {message}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv",
    [("--backbone", "resnet18", "--shape", "32", "32", "--exchange", "mdconv", "layer4.1.conv2"), ("--table", "dk")],
)
def test_without_the_compiled_library(tmp_path, argv):
    env = without("dk_detection._C", tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "complexity.py", *argv], capture_output=True, text=True, env=env, check=False
    )
    *progress, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert re.match("complexity.py: .*the compiled library of dk_detection could not be loaded .* run `pip", last)
    assert all(re.match(r"\d+/\d+ ", line) for line in progress)


def test_interrupted(capsys, monkeypatch):
    def interrupt(**kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(paper_tables, "dk_table", interrupt)
    assert run(capsys, "--table", "dk") == (130, "", "complexity.py: interrupted\n")
