"""The rows of the papers' tables, counted from real modules."""

import math
from pathlib import Path

import paper_tables
import pytest
from paper_tables import (
    CLASSIFIERS,
    EVOLVED,
    EVOLVED_PLACES,
    EVOLVED_TOKENS,
    PLACES,
    SETTINGS,
    Classifier,
    count_classifier,
    count_dcnv2,
    count_evolved,
    dcnv2_table,
    dk_table,
)
from torch import nn

from dk_detection import to_deformable
from dk_detection.complexity.backbones import build_backbone, count_backbone
from dk_detection.complexity.counting import Part, total

# Tables 1 and 2 of Deformable Kernels.


def name_of(row: Classifier) -> str:
    return f"{row.backbone} 1x1 {row.conv1x1} 3x3 {row.conv3x3}"


_counted = {}


def counted(row: Classifier) -> tuple[Part, int]:
    """`count_classifier`, once for each row: this takes a second or two."""
    return _counted.get(name_of(row)) or _counted.setdefault(name_of(row), count_classifier(row))


@pytest.mark.parametrize(("backbone", "blocks", "c2"), [("resnet50-dw", 16, 3), ("mobilenet-v2", 17, 3)])
def test_places(backbone, blocks, c2):
    convs = {name: m for name, m in build_backbone(backbone).named_modules() if isinstance(m, nn.Conv2d)}
    stem = next(iter(convs))
    places = PLACES[backbone].items()
    names = {place: to_deformable(build_backbone(backbone), "dk", select=select) for place, select in places}
    assert len(names["3x3"]) == blocks and len(names["3x3 in c2"]) == c2
    assert names["3x3 in c2"] + names["3x3 in c3-c5"] == names["3x3"]
    assert names["3x3"] == [n for n, conv in convs.items() if conv.kernel_size == (3, 3) and n != stem]
    assert names["1x1"] == [n for n, conv in convs.items() if conv.kernel_size == (1, 1) and "downsample" not in n]


def test_classifiers():
    assert len({name_of(row) for row in CLASSIFIERS}) == len(CLASSIFIERS) == 22


@pytest.mark.parametrize("row", CLASSIFIERS, ids=name_of)
def test_classifier(row):
    part, by_paper = counted(row)
    assert abs(round(part.parameters / 1e6, 1) - row.parameters) < 0.05  # the paper's figure itself
    assert abs(round(by_paper / 1e9, 2) - row.gflops) < 0.015  # one unit in the last digit


def test_layers_add_what_the_paper_says_as_they_run():
    gflops = {}
    for row in CLASSIFIERS:
        if row.backbone != "resnet50" and row.conv1x1 == "-":
            gflops[row.backbone, row.conv3x3] = counted(row)[0].multiply_adds / 1e9, row.gflops
    assert len(gflops) == 13
    for (backbone, _), (ours, paper) in gflops.items():
        rigid = gflops[backbone, "-"]
        assert abs(ours - rigid[0] - (paper - rigid[1])) < 0.01


def test_as_it_runs():
    row = next(row for row in CLASSIFIERS if name_of(row) == "mobilenet-v2 1x1 - 3x3 local 4x4")
    parts = count_backbone("mobilenet-v2", exchange=[dict(layer="dk", select=PLACES["mobilenet-v2"]["3x3"])])
    assert counted(row)[0] == Part("mobilenet-v2", total(parts).parameters, total(parts).multiply_adds)


def test_documented_table():
    text = (Path(__file__).parents[2] / "docs" / "complexity.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(("| resnet50", "| mobilenet-v2"))]
    assert len(lines) == len(CLASSIFIERS)
    for line, row in zip(lines, CLASSIFIERS, strict=True):
        part, by_paper = counted(row)
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells == [
            *(row.backbone, row.conv1x1, row.conv3x3, f"{part.parameters / 1e6:.1f}", str(row.parameters)),
            *(f"{by_paper / 1e9:.2f}", f"{row.gflops:.2f}", f"{part.multiply_adds / 1e9:.2f}"),
        ]


def test_dk_table(monkeypatch):
    rows = [row for row in CLASSIFIERS if row.backbone == "mobilenet-v2" and row.conv1x1 == "-"][:2]
    monkeypatch.setattr(paper_tables, "CLASSIFIERS", rows)
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


# Table 1 of Differentiable Kernel Evolution.


@pytest.mark.parametrize("row", EVOLVED, ids=lambda row: f"{row.backbone} {row.kind}")
def test_kernel_evolution(row):
    part = count_evolved(row)
    # The paper's figures, where docs/complexity.md names no difference: as near as their last digits.
    if (row.backbone, row.kind) != ("resnet101", "DCN"):
        assert abs(part.parameters / 1e6 - row.parameters) < 0.2
    if row.kind == "-":
        return
    network = build_backbone(row.backbone)
    convs = dict(network.named_modules())
    replaced = to_deformable(network, EVOLVED_TOKENS[row.kind], select=EVOLVED_PLACES[row.backbone])
    assert len(replaced) == {"alexnet": 5, "resnet18": 12, "resnet101": 30}[row.backbone]
    if row.kind == "DKE":  # two coordinates and a score for each input channel and tap, and the score's bias
        more = sum((3 * convs[name].in_channels + 1) * math.prod(convs[name].kernel_size) for name in replaced)
        rigid = next(first for first in EVOLVED if first.backbone == row.backbone)
        assert part.parameters - count_evolved(rigid).parameters == more


# Table 1 of Deformable ConvNets v2.


@pytest.fixture
def count_config():
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from dk_detection.mmdet.complexity import count_config

    return count_config


def test_settings():
    names = [setting.name for setting in SETTINGS]
    assert len(names) == len(set(names)) == 7
    for index, setting in enumerate(SETTINGS):
        assert setting.after in (names[:index] or [None])


def test_steps_of_faster_rcnn(count_config):
    sums = count_dcnv2("faster", count_config)
    assert sums.keys() == {setting.name for setting in SETTINGS}
    paper = {setting.name: setting.faster for setting in SETTINGS}
    for name, after in ((setting.name, setting.after) for setting in SETTINGS if setting.after):
        parameters = (sums[name].parameters - sums[after].parameters) / 1e6
        gflops = (sums[name].multiply_adds - sums[after].multiply_adds) / 1e9
        assert gflops == pytest.approx(paper[name][1] - paper[after][1], abs=0.15), name
        # The last step has 0.44M fewer than the paper's; docs/complexity.md.
        off = -0.44 if name == "mdconv@c3-c5 + mdpool" else 0
        assert parameters == pytest.approx(paper[name][0] - paper[after][0] + off, abs=0.15), name


def test_dcnv2_table(monkeypatch, count_config):
    monkeypatch.setattr(paper_tables, "SETTINGS", SETTINGS[:2])
    calls = []
    text = dcnv2_table(count_config, (64, 96), 3, lambda *call: calls.append(call))
    assert calls == [
        (index, 2, f"{detector}, {name}")
        for detector in ("Faster R-CNN", "Mask R-CNN")
        for index, name in enumerate(("regular", "dconv@c5"))
    ]
    titles = [line for line in text.splitlines() if line and not line.startswith("|")]
    assert titles == ["Faster R-CNN, 64x96, 3 RoIs", "Mask R-CNN, 64x96, 3 RoIs"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[1][0] == "regular" and cells[1][2] == "51.3" and cells[1][6] == "196.8"
    assert cells[2][0] == "dconv@c5" and cells[2][3:5] == ["+0.25", "+0.2"] and cells[2][8] == "+0.9"
    assert cells[5][3:5] == ["+0.25", "+0.3"]
