"""tools/evaluate.py: its tables, and the figures in them."""

import importlib
import json
import math

import pytest

from dk_detection.evaluation import shards
from tests.evaluation.made_up import without, write
from tests.evaluation.test_average_precision import pycocotools_figures
from tests.evaluation.test_submission import files_of_at_most
from tests.tools.test_make_submission import CONFIGS

VAL = ["--ann", "instances_val.json"]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the tables by their first cell; of several the first. Headers are none."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in reversed(cells) if row[1] != "AP"}


def test_table(files, call, content, results):
    argv = [*VAL, "--results", "results.json", "--resamples", "50", "--categories", "--json", "out.json"]
    code, out, err = call("evaluate", *argv)
    assert (code, err) == (0, "")
    assert out.startswith("val, 8 images, COCO metric, 0 to 100; below, 95% intervals from 50 resamples of the images")
    table, record = rows(out), json.loads((files / "out.json").read_text())
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        expected = pycocotools_figures(content, results, kind)
        assert table[name] == [f"{value:.1f}" for value in expected]
        assert list(record[name]["figures"].values()) == expected
        if name == "box":
            assert table[""] == ["{:.1f} to {:.1f}".format(*bounds) for bounds in record[name]["intervals"].values()]
        for figure, (low, high) in record[name]["intervals"].items():
            assert low < record[name]["figures"][figure] < high
        assert list(record[name]["categories"]) == ["ball", "cube", "cone"]
    assert len(table["ball"]) == 6 and (record["images"], record["resamples"]) == ("val", 50)


def test_without_intervals(files, call, results):
    write(files / "boxes.json", without(results[:5], "segmentation"))
    argv = [*VAL, "--results", "boxes.json", "--resamples", "0", "--json", "out.json"]
    code, out, _ = call("evaluate", *argv)
    assert code == 0 and "intervals" not in out and "mask" not in out
    assert "intervals" not in json.loads((files / "out.json").read_text())["box"]


def test_comparison(files, call, results):
    write(files / "fewer.json", results[::2])
    argv = [*VAL, "--compare", "fewer.json", "results.json", "--resamples", "50", "--json", "out.json"]
    code, out, err = call("evaluate", *argv)
    assert (code, err) == (0, "") and out.startswith("A: fewer.json\nB: results.json\nval, 8 images")
    record = json.loads((files / "out.json").read_text())["box"]["AP"]
    table = rows(out)
    assert float(table["B - A"][0]) > 0 and table["B is ahead in"][0] == f"{100 * record['certainty']:.1f}%"
    assert record["interval"][0] < record["value"] < record["interval"][1] and 0 < record["p_value"] <= 1
    assert math.isclose(record["value"], float(table["B - A"][0]), abs_tol=0.05) and "mask, A" in table


def test_figures_on_a_full_disk_leave_those_of_before(files, call):
    (files / "out.json").write_text("before")
    with files_of_at_most(100):
        code, _, err = call("evaluate", *VAL, "--results", "results.json", "--resamples", "0", "--json", "out.json")
    assert code == 1 and "--json out.json: the file cannot be written" in err
    assert (files / "out.json").read_text() == "before" and not list(files.glob("*.part"))
    assert call("evaluate", *VAL, "--results", "results.json", "--resamples", "0", "--json", "/dev/null")[0] == 0


def test_undefined_figures(files, call, content, results):
    """Without a large object there is no figure of large ones."""
    small = dict(content, annotations=[each for each in content["annotations"] if each["area"] < 96**2])
    write(files / "instances_small.json", small)
    argv = ["--ann", "instances_small.json", "--resamples", "20", "--json", "out.json"]
    code, out, _ = call("evaluate", *argv, "--results", "results.json")
    assert code == 0 and rows(out)["box"][5] == rows(out)[""][5] == "-"
    assert json.loads((files / "out.json").read_text())["box"]["figures"]["L"] is None
    code, out, _ = call("evaluate", *argv, "--compare", "results.json", "results.json")
    assert code == 0 and "nan" not in out and rows(out)["B - A"] == ["+0.0"] * 5 + ["-"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--results", "results.json"], 2, "--ann is needed"),
        (VAL, 2, "name detections by --results, or a detector"),
        (["--ann", "a.json", "--compare", "a", "b", "--results", "c"], 2, "--compare takes the place of"),
        (["--ann", "a.json", "--compare", "a", "b", "--resamples", "0"], 2, "needs --resamples of at least 1"),
        (["--ann", "a.json", "--results", "c", "--seed", "-1"], 2, "must not be negative"),
        (["--ann", "image_info_test-dev.json", "--results", "results.json"], 1, "there are no annotations"),
        ([*VAL, "--results", "empty.json"], 1, "there is no detection to evaluate"),
        ([*VAL, "--compare", "boxes.json", "masks.json"], 1, "have nothing in common"),
        ([*VAL, "--results", "boxes.json", "--json", "no/out.json"], 1, "cannot be written"),
    ],
)
def test_refusals(files, call, results, argv, code, message):
    write(files / "empty.json", [])
    write(files / "boxes.json", without(results[:4], "segmentation"))
    write(files / "masks.json", without(results[:4], "bbox"))
    status, _, err = call("evaluate", *argv)
    assert status == code and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("framework", CONFIGS)
def test_a_checkpoint_on_the_test_set_of_its_config(files, call, results, monkeypatch, framework):
    pytest.importorskip(framework, reason="the framework is not installed")
    inference = importlib.import_module(f"dk_detection.{framework}.inference")

    def detect(config, checkpoint, images, image_folder, folder, **options):
        assert image_folder == "pictures"
        shards.claim(folder)
        for image in images.images:
            entries = without([entry for entry in results if entry["image_id"] == image], "image_id")
            shards.Writer(folder, image).write(image, entries)

    monkeypatch.setattr(inference, "run", detect)
    monkeypatch.setattr(inference, "test_set", lambda config, options: ("instances_val.json", "pictures"))
    argv = ["--config", str(CONFIGS[framework]), "--checkpoint", "c.pth", "--resamples", "0", "--work-dir", "here"]
    code, out, err = call("evaluate", *argv)
    assert (code, err) == (0, "") and "box" in rows(out) and (files / "here" / "shard-10.jsonl").is_file()
