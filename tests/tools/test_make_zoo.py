"""The zoo: a row for each config, a page that is in step with it, and one command that adds figures."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEM = "mask-rcnn_r50_fpn_16e_coco"
RUN = ["--framework", "mmdet", "--command", "python x.py", "--seed", "3", "--hardware", "a CPU", "--log", "log.txt"]


@pytest.fixture
def make_zoo(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import make_zoo

    return make_zoo


def test_a_row_for_each_config(make_zoo):
    zoo = make_zoo.read()
    for framework in make_zoo.FRAMEWORKS:
        files = [path for path in (make_zoo.CONFIGS / framework).rglob("*_*.*") if path.suffix in (".py", ".yaml")]
        rows = [stem for stem in zoo if framework == "mmdet" or not stem.startswith("ssd_")]
        assert sorted(path.stem for path in files if path.parent.name != "_base_") == sorted(rows)


def test_the_page_is_in_step(make_zoo):
    """If not: python tools/make_zoo.py."""
    zoo = make_zoo.read()
    assert make_zoo.PAGE.read_text(encoding="utf-8") == make_zoo.render(zoo)
    assert all(f"`{stem}`" in make_zoo.render(zoo) for stem in zoo)


def test_costs_are_those_of_the_configs(make_zoo):
    """If not: python tools/make_zoo.py --count."""
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    stem = "mask-rcnn_r18-mdconv-c3-c5_fpn_mdpool_1k_deformed-shapes"
    assert make_zoo.count(stem).items() <= make_zoo.read()[stem].items()


def test_the_papers_costs_are_those_of_the_tables_of_complexity(make_zoo):
    import paper_tables

    zoo = make_zoo.read()
    for detector, (_, stem) in paper_tables.DETECTORS.items():
        for setting in paper_tables.SETTINGS:
            first = zoo[stem.format(setting.backbone, setting.pooling)]["paper"][0]
            assert (first["table"], first["row"]) == (1, setting.name)
            assert (first["parameters"], first["gflops"]) == getattr(setting, detector)


@pytest.fixture
def copied(make_zoo, tmp_path, monkeypatch):
    """The tool over a copy of the file, and figures as tools/evaluate.py writes them."""
    for name in ("ZOO", "PAGE"):
        path = tmp_path / getattr(make_zoo, name).name
        path.write_bytes(getattr(make_zoo, name).read_bytes())
        monkeypatch.setattr(make_zoo, name, path)
    box = dict(figures=dict(AP=41.234, AP50=60, AP75=45, S=None, M=44.4, L=50), intervals=dict(AP=[40.01, 42.5]))
    mask = dict(figures=dict(AP=37, AP50=55, AP75=40, S=17, M=40, L=50))
    (tmp_path / "figures.json").write_text(json.dumps(dict(images="val2017", box=box, mask=mask)))
    return make_zoo


def test_without_options_nothing_changes(copied):
    before = [path.read_bytes() for path in (copied.ZOO, copied.PAGE)]
    assert copied.run(copied.main, []) == 0
    assert [path.read_bytes() for path in (copied.ZOO, copied.PAGE)] == before


def test_figures_are_added(copied, tmp_path):
    others = {stem: row for stem, row in copied.read().items() if stem != STEM}
    for _ in range(2):
        assert copied.run(copied.main, ["--add", STEM, "--figures", str(tmp_path / "figures.json"), *RUN]) == 0
    zoo = copied.read()
    assert len(zoo[STEM]["runs"]) == 2 and {stem: row for stem, row in zoo.items() if stem != STEM} == others
    assert zoo[STEM]["runs"][0] == dict(
        framework="mmdet",
        images="val2017",
        box=dict(AP=41.2, AP50=60, AP75=45, M=44.4, L=50),
        box_interval=[40.0, 42.5],
        mask=dict(AP=37, AP50=55, AP75=40, S=17, M=40, L=50),
        command="python x.py",
        seed=3,
        hardware="a CPU",
        log="log.txt",
    )
    page = copied.PAGE.read_text()
    assert "41.2 / 44.4, 50.0 (40.0 to 42.5), MMDetection, val2017; 41.2" in page and "37.0 / 17.0, 40.0, 50.0" in page
    assert f"- `{STEM}`, MMDetection: `python x.py`, seed 3, a CPU; log: log.txt" in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "no-such"], "--count no-such: there is no such config"),
        (["--add", "no-such", "--figures", "figures.json", *RUN], "there is no such config"),
        (["--add", STEM, "--figures", "gone.json", *RUN], "gone.json is not what tools/evaluate.py --json writes"),
        (["--add", STEM, "--figures", "empty.json", *RUN], "empty.json is not what tools/evaluate.py --json writes"),
        (["--add", STEM, *RUN], "--add goes with --figures"),
        (["--seed", "0"], "--add goes with --figures"),
    ],
)
def test_refusals(copied, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("{}")
    before = copied.ZOO.read_bytes()
    try:
        code = copied.run(copied.main, argv)
    except SystemExit as error:
        code = error.code
    assert code and message in capsys.readouterr().err and copied.ZOO.read_bytes() == before
