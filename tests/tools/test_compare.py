"""tools/compare.py: what it runs, what it skips, and the table. The training itself is that of train_net.py."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "compare.py"

# Stands in for train_net.py: leaves figures that tell config and seed apart, and keeps a record of its calls.
FAKE_TRAIN_NET = """
import json, sys
from pathlib import Path

arguments = sys.argv[1:]
with open(Path(__file__).with_name("calls"), "a") as file:
    file.write(json.dumps(arguments) + "\\n")
config, work_dir = (Path(arguments[arguments.index(name) + 1]) for name in ("--config", "--work-dir"))
seed = int(next(a for a in arguments if a.startswith("randomness.seed=")).partition("=")[2])
if config.stem == "broken" and seed == 1:
    sys.exit("no such thing")
work_dir.mkdir(parents=True, exist_ok=True)
metrics = {"coco/bbox_mAP": 0.4 + 0.01 * seed, "coco/segm_mAP": 0.3}
metrics = {"blind": {}, "boxes": {"coco/bbox_mAP": 0.5}}.get(config.stem, metrics)
(work_dir / "val.metrics.json").write_text(json.dumps({"metrics": metrics}))
"""


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """A function that runs the command line over configs of the given stems."""
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "train_net.py").write_text(FAKE_TRAIN_NET)
    monkeypatch.setattr(module, "TRAIN_NET", tmp_path / "train_net.py")

    def run(*stems, options=()):
        configs = [tmp_path / f"{stem}.py" for stem in stems]
        for config in configs:
            config.touch()
        out, runs = tmp_path / "docs" / "table.md", tmp_path / "runs"
        code = module.main(["--configs", *map(str, configs), "--out", str(out), "--work-dir", str(runs), *options])
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return code, out.read_text(), calls

    return run


def test_table(compare):
    code, text, calls = compare("sharp", "blind", "boxes", options=["--seeds", "0", "1", "4", "--cfg-options", "a.b=1"])
    assert code == 0
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `sharp` | 41.7 ± 2.1 (40.0, 41.0, 44.0) | 30.0 ± 0.0 (30.0, 30.0, 30.0) |",
        "| `blind` | 0.0 ± 0.0 (0.0, 0.0, 0.0) | 0.0 ± 0.0 (0.0, 0.0, 0.0) |",
        "| `boxes` | 50.0 ± 0.0 (50.0, 50.0, 50.0) | - |",
    ]
    assert "seeds 0, 1, 4" in text and "`a.b=1`" in text
    assert len(calls) == 9 and all("--resume" in call and call[-2] == "a.b=1" for call in calls)
    assert len({call[call.index("--work-dir") + 1] for call in calls}) == 9


def test_one_seed_has_no_spread(compare):
    _, text, _ = compare("sharp", options=["--seeds", "2"])
    assert "| `sharp` | 42.0 (42.0) | 30.0 (30.0) |" in text


def test_failure_keeps_what_is_finished(compare):
    code, text, calls = compare("sharp", "broken", options=["--seeds", "0", "1"])
    assert code == 1
    assert "| `sharp` | 40.5 ± 0.7 (40.0, 41.0) |" in text and "| `broken` | 40.0 (40.0) |" in text
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "nowhere.py"], "there is no nowhere.py"),
        (["--configs", str(SCRIPT), str(SCRIPT)], "compare is given twice"),
        (["--configs", str(SCRIPT), "--seeds", "0", "0"], "0 is given twice"),
    ],
)
def test_bad_arguments(arguments, message):
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--out", "x.md"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
