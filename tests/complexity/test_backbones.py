"""Backbones by name, and the rows of Deformable Kernels' Tables 1 and 2, counted from real modules."""

from pathlib import Path

import pytest

from dk_detection.complexity import backbones
from dk_detection.complexity.backbones import ROWS, Row, count_backbone, count_row, dk_table
from dk_detection.complexity.counting import Part, total
from dk_detection.errors import UserError


def name_of(row: Row) -> str:
    return f"{row.backbone} 1x1 {row.conv1x1} 3x3 {row.conv3x3}"


_counted = {}


def counted(row: Row) -> tuple[Part, int]:
    """`count_row`, once for each row: this takes a second or two."""
    return _counted.get(name_of(row)) or _counted.setdefault(name_of(row), count_row(row))


def test_rows():
    assert len({name_of(row) for row in ROWS}) == len(ROWS) == 22


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_row(row):
    part, by_paper = counted(row)
    assert abs(round(part.parameters / 1e6, 1) - row.parameters) < 0.05  # the paper's figure itself
    assert abs(round(by_paper / 1e9, 2) - row.gflops) < 0.015  # one unit in the last digit


def test_layers_add_what_the_paper_says_as_they_run():
    gflops = {}
    for row in ROWS:
        if row.backbone != "resnet50" and row.conv1x1 == "-":
            gflops[row.backbone, row.conv3x3] = counted(row)[0].multiply_adds / 1e9, row.gflops
    assert len(gflops) == 13
    for (backbone, _), (ours, paper) in gflops.items():
        rigid = gflops[backbone, "-"]
        assert abs(ours - rigid[0] - (paper - rigid[1])) < 0.01


def test_as_it_runs():
    row = next(row for row in ROWS if name_of(row) == "mobilenet-v2 1x1 - 3x3 local 4x4")
    parts = count_backbone("mobilenet-v2", conv3x3="dk")
    assert counted(row)[0] == Part("mobilenet-v2", total(parts).parameters, total(parts).multiply_adds)


def test_documented_table():
    text = (Path(__file__).parents[2] / "docs" / "complexity.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(("| resnet50", "| mobilenet-v2"))]
    assert len(lines) == len(ROWS)
    for line, row in zip(lines, ROWS, strict=True):
        part, by_paper = counted(row)
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells == [
            *(row.backbone, row.conv1x1, row.conv3x3, f"{part.parameters / 1e6:.1f}", str(row.parameters)),
            *(f"{by_paper / 1e9:.2f}", f"{row.gflops:.2f}", f"{part.multiply_adds / 1e9:.2f}"),
        ]


def test_table(monkeypatch):
    rows = [row for row in ROWS if row.backbone == "mobilenet-v2" and row.conv1x1 == "-"][:2]
    monkeypatch.setattr(backbones, "ROWS", rows)
    calls = []
    header, _, *lines = dk_table(lambda *call: calls.append(call)).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        *("backbone", "1x1", "3x3", "#P (M)", "paper", "GFLOPs", "paper", "as it runs")
    ]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:2]] == [
        ["mobilenet-v2", "-", "-", "3.5", "3.5", "0.31", "0.31", "0.30"],
        ["mobilenet-v2", "-", "global 4x4", "3.7", "3.7", "0.32", "0.31", "0.30"],
    ]
    assert "docs/complexity.md" in lines[-1]
    assert calls == [(0, 2, "mobilenet-v2, 1x1 -, 3x3 -"), (1, 2, "mobilenet-v2, 1x1 -, 3x3 global 4x4")]


# Networks by name.


def test_by_name():
    # The figures that torchvision's documentation gives for it: 25557032 parameters, 4.09 GFLOPs.
    parts = count_backbone("resnet50")
    assert [part.name for part in parts] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert total(parts).parameters == 25557032
    assert round(total(parts).multiply_adds / 1e9, 2) == 4.09


def test_layers_and_shape():
    rigid = total(count_backbone("mobilenet-v2", (64, 96)))
    dk = total(count_backbone("mobilenet-v2", (64, 96), conv3x3=dict(layer="dk", stages="c5")))
    mdconv = total(
        count_backbone("mobilenet-v2", (64, 96), exchange=[dict(layer="mdconv", select="features.17.conv.1.0")])
    )
    branch = 960 * 27 * 9  # 2 x 3 positions
    assert mdconv.parameters - rigid.parameters == branch + 27
    assert mdconv.multiply_adds - rigid.multiply_adds == 6 * (branch + 960 * 9 * 3)
    assert dk.parameters > rigid.parameters and dk.multiply_adds > rigid.multiply_adds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="resnet50dw"), "there is no backbone 'resnet50dw'; there are resnet50-dw, mobilenet-v2 and torch"),
        (dict(name="fasterrcnn_resnet50_fpn"), "there is no backbone"),
        (dict(name="resnet18", conv3x3="dk"), "conv3x3 is for resnet50-dw and mobilenet-v2; resnet18 takes exchange"),
        (dict(name="resnet50-dw", conv3x3="dcn"), "resnet50-dw cannot be counted: no layer has the token 'dcn'"),
        (dict(name="resnet50-dw", conv3x3=dict(layer="dk", scope=5)), "resnet50-dw cannot be counted: .*'scope'"),
        (dict(name="resnet18", exchange=[dict(layer="dk", select="layer9.*")]), "matches no rigid nn.Conv2d"),
        (dict(name="alexnet", shape=(8, 8)), "alexnet cannot be counted: .*too small"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        count_backbone(**arguments)
