"""tools/compare.py: what it runs, what it skips, and the tables. The training itself is that of train_net.py."""

import json
import subprocess
import sys
from pathlib import Path

import compare as tool
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "compare.py"


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """A function that runs the command line over configs of the given stems, with a training that only leaves figures.

    They tell config and seed apart. The config "broken" fails with seed 1, "stopped" is interrupted with it.
    """
    calls = []

    def train_net(argv):
        calls.append(argv)
        config, work_dir = (Path(argv[argv.index(name) + 1]) for name in ("--config", "--work-dir"))
        seed = int(argv[-1].removeprefix("randomness.seed="))
        if seed == 1 and config.stem in ("broken", "stopped"):
            return {"broken": 1, "stopped": 130}[config.stem]
        box = 0.4 + 0.01 * seed
        metrics = {
            "blind": {},
            "boxes": {"coco/bbox_mAP": 0.5},
            "better": {"coco/bbox_mAP": box + 0.02 + 0.001 * seed, "coco/segm_mAP": 0.3},
            "empty": {"coco/bbox_mAP": -1.0 if seed == 1 else 0.42, "coco/segm_mAP": -1.0},
            "classes": {"accuracy": 90 + seed, "accuracy_scale_1": 80},
            "pixels": {"aAcc": 95.0, "mIoU": 70.0 + seed, "mAcc": 80.0},
        }.get(config.stem, {"coco/bbox_mAP": box, "coco/segm_mAP": 0.3})
        log = work_dir / "started" / "vis_data" / "scalars.json"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('{"lr": 0.1, "loss": 2.5, "iter": 20, "step": 20}\n{"coco/bbox_mAP": 0.4, "step": 20}\n')
        (work_dir / "val.metrics.json").write_text(json.dumps({"metrics": metrics}))
        return 0

    monkeypatch.setattr(tool.train_net, "main", train_net)

    def run(*stems, options=()):
        calls.clear()
        configs = [tmp_path / f"{stem}.py" for stem in stems]
        for config in configs:
            config.touch()
        out = tmp_path / "docs" / "table.md"
        arguments = ["--configs", *map(str, configs), "--out", str(out), "--work-dir", str(tmp_path / "runs"), *options]
        return tool.main(arguments), out.read_text(), list(calls)

    run.records = tmp_path / "docs" / "table.jsonl"
    return run


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def test_tables(compare):
    code, text, calls = compare("sharp", "blind", "boxes", options=["--seeds", "0", "1", "4", "--cfg-options", "a.b=1"])
    assert code == 0
    means = [row[:4] for row in rows(text) if "less" not in row[0]]
    # 2.0817 * 4.3027 / sqrt(3), Student's t at two degrees of freedom
    assert means == [
        ["`sharp`", "3", "41.7 ± 5.2 (40.0, 41.0, 44.0)", "30.0 ± 0.0 (30.0, 30.0, 30.0)"],
        ["`blind`", "3", "0.0 ± 0.0 (0.0, 0.0, 0.0)", "0.0 ± 0.0 (0.0, 0.0, 0.0)"],
        ["`boxes`", "3", "50.0 ± 0.0 (50.0, 50.0, 50.0)", "undefined"],
    ]
    assert "seeds 0, 1, 4" in text and "`a.b=1`" in text and "threads: " in text
    assert len(calls) == 9 and all("--resume" in call and call[-2] == "a.b=1" for call in calls)
    assert len({call[call.index("--work-dir") + 1] for call in calls}) == 9
    assert [call[-1][-1] for call in calls] == list("000111444")  # seed after seed


def test_differences(compare):
    _, text, _ = compare("sharp", "better", "blind", options=["--pair", "sharp", "better", "--pair", "blind", "sharp"])
    differences = [row for row in rows(text) if "less" in row[0]]
    # By box AP 2.0, 2.1 and 2.2: 0.1 * 4.3027 / sqrt(3)
    assert differences[0][:4] == ["`better` less `sharp`", "+2.1", "+1.9 to +2.3", "3 of 3"]
    assert differences[1][0] == "`sharp` less `blind`"
    t, holm = (float(value) for value in differences[0][4:6])
    assert t == pytest.approx(0.00075, rel=0.02) and holm == pytest.approx(0.00075, rel=0.02)
    assert "corrected for the 2 comparisons" in text and len(differences) == 4


def test_undefined_figures(compare):
    _, text, _ = compare("empty", "sharp")
    assert rows(text)[0][1:4] == ["3", "42.0 ± 0.0 (42.0, undefined, 42.0)", "undefined"]
    assert "-100" not in text and "left out of the means" in text
    assert "less" not in text  # two pairs are too few


def test_classifiers_and_short_names(compare):
    _, text, _ = compare("classes", options=["--seeds", *map(str, range(6))])
    assert rows(text)[0][:3] == ["`classes`", "6", "92.5 ± 2.0"]  # six figures are too many for a cell
    assert "scale" not in text
    names = tool.short_names(["net-dk_2e_shapes", "net_2e_shapes"])
    assert names == {"net-dk_2e_shapes": "net-dk", "net_2e_shapes": "net"}


def test_segmentors(compare):
    _, text, _ = compare("pixels")
    assert "| config | seeds | mIoU | seconds a run |" in text
    assert rows(text)[0][:3] == ["`pixels`", "3", "71.0 ± 2.5 (70.0, 71.0, 72.0)"]  # Student's t: 4.3027 / sqrt(3)


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        ("lazy.py", "from detectron2.config import LazyCall\n", ["a.b=1", "train.output_dir={}", "train.seed=3"]),
        ("saved.yaml", "model: {_target_: x}\n_target_: y\n", ["a.b=1", "train.output_dir={}", "train.seed=3"]),
        ("yaml.yaml", "MODEL: {}\n", ["a.b", "1", "OUTPUT_DIR", "{}", "SEED", "3"]),
    ],
)
def test_detectron2(tmp_path, monkeypatch, name, text, settings):
    config, work_dir = tmp_path / name, tmp_path / "runs"
    config.write_text(text)
    calls = []

    def train_net(argv):
        calls.append(argv)
        (run,) = (word.removeprefix("train.output_dir=") for word in argv if str(work_dir) in word)
        Path(run).mkdir(parents=True)
        (Path(run) / "metrics.json").write_text(
            '{"iteration": 9, "lr": 0.1, "total_loss": 2.0}\n{"iteration": 9, "bbox/AP": 20.0, "bbox/APl": NaN}\n'
            '{"iteration": 19, "lr": 0.1, "total_loss": 1.0}\n{"iteration": 20, "bbox/AP": 30.0, "bbox/APl": NaN}\n'
        )
        return 0

    monkeypatch.setattr(tool.train_net, "main", train_net)
    out = tmp_path / "table.md"
    arguments = ["--configs", str(config), "--seeds", "3", "--out", str(out), "--work-dir", str(work_dir)]
    assert tool.main([*arguments, "--cfg-options", "a.b=1"]) == 0
    (run,) = work_dir.glob("*/seed3_*")
    assert calls == [["--config", str(config), "--resume", *(word.format(run) for word in settings)]]
    record = json.loads(out.with_suffix(".jsonl").read_text())
    assert record["loss"] == [[10, 2.0], [20, 1.0]] and record["metrics"] == {"bbox/AP": 30.0, "bbox/APl": -1.0}
    assert rows(out.read_text())[0][:3] == [f"`{config.stem}`", "1", "30.0 (30.0)"]


def test_nothing_detected_by_detectron2(tmp_path):
    config = tmp_path / "lazy.py"
    config.write_text("from detectron2.config import LazyCall\n")
    (tmp_path / "metrics.json").write_text('{"iteration": 20, "bbox/AP": NaN, "bbox/APl": NaN}\n')
    record = tool.record_of(config, tmp_path)
    assert record == {"metrics": {}, "loss": []} and tool.figure(record, "bbox/AP") == 0


def test_one_seed_has_no_interval(compare):
    _, text, _ = compare("sharp", options=["--seeds", "2"])
    assert rows(text)[0][:4] == ["`sharp`", "1", "42.0 (42.0)", "30.0 (30.0)"]


def test_finished_runs_are_not_repeated(compare):
    compare("sharp", options=["--seeds", "0", "1"])
    with open(compare.records, "a") as file:
        file.write('{"config": "sharp", "se')  # killed while it wrote
    _, text, calls = compare("sharp", "better", options=["--seeds", "0", "1", "2"])
    assert [(Path(call[1]).stem, call[-1][-1]) for call in calls] == [
        ("better", "0"),
        ("better", "1"),
        ("sharp", "2"),
        ("better", "2"),
    ]
    assert [row[1] for row in rows(text)[:2]] == ["3", "3"]
    records = [json.loads(line) for line in compare.records.read_text().splitlines()]
    assert len(records) == 6 and records[0]["loss"] == [[20, 2.5]]
    assert records[0]["threads"] >= 1 and "torch" in records[0]["versions"]
    assert len(compare("sharp", options=["--seeds", "0", "--cfg-options", "a=1"])[2]) == 1  # other settings, other runs


@pytest.mark.parametrize(("stem", "code"), [("broken", 1), ("stopped", 130)])
def test_failure_keeps_what_is_finished(compare, capsys, stem, code):
    found, text, calls = compare("sharp", stem, options=["--seeds", "0", "1"])
    assert found == code and len(calls) == 4
    assert [row[:2] for row in rows(text)[:2]] == [["`sharp`", "2"], [f"`{stem}`", "1"]]
    assert ("goes on from here" in capsys.readouterr().err) == (stem == "stopped")


def test_time_left(tmp_path):
    records = tool.Records(tmp_path / "records.jsonl", [])
    jobs = [(seed, Path(stem)) for seed in range(3) for stem in ("a", "b")]
    assert tool.time_left(records, jobs) == ""
    for seed, seconds in enumerate((50, 70)):
        records.add({"config": "a", "seed": seed, "options": [], "seconds": seconds})
    assert tool.time_left(records, jobs) == "; about 6 min left"
    assert tool.time_left(records, []) == "; less than a minute left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "nowhere.py"], "there is no nowhere.py"),
        (["--configs", str(SCRIPT), str(SCRIPT)], "compare is given twice"),
        (["--configs", str(SCRIPT), "--seeds", "0", "0"], "0 is given twice"),
        (["--configs", str(SCRIPT), "--pair", "compare", "other"], "other is no stem of --configs"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main([*arguments, "--out", "x.md"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "docs" / "study").glob("*.txt"))])
def test_the_study(monkeypatch, name):
    """The command line is one, the records are of its runs, and a page has their table."""
    monkeypatch.chdir(ROOT)
    args = tool.parse_args([f"@docs/study/{name}.txt"])
    records = tool.Records(args.out.with_suffix(".jsonl"), args.cfg_options)
    runs = {(config.stem, seed) for config in args.configs for seed in args.seeds}
    assert records.runs and records.runs.keys() <= runs
    table = tool.table(records, args.configs, args.seeds, args.pair)
    assert args.out.read_text() == table
    assert any(table.strip() in page.read_text() for page in Path("docs").glob("*.md"))


def test_options_from_a_file(tmp_path):
    (tmp_path / "study.txt").write_text("--configs\nnowhere.py\n--out\nx.md\n")
    done = subprocess.run([sys.executable, SCRIPT, f"@{tmp_path}/study.txt"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no nowhere.py" in done.stderr
