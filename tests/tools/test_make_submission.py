"""tools/make_submission.py: what it prints and refuses, and that it runs detectors of both frameworks."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dk_detection.evaluation import shards
from tests.evaluation.made_up import without, write
from tests.evaluation.test_average_precision import pycocotools_figures

TOOLS = Path(__file__).parents[2] / "tools"
SET = ["--ann", "image_info_test-dev.json", "--alg", "a"]
CONFIGS = {
    "mmdet": TOOLS.parent / "configs/mmdet/deformed_shapes/mask-rcnn_r18_fpn_1k_deformed-shapes.py",
    "detectron2": TOOLS.parent / "configs/detectron2/deformed_shapes/mask-rcnn_r18_fpn_1k_deformed-shapes.py",
}


def test_packages(files, call, content, results):
    argv = ["--ann", "instances_val.json", "--alg", "DCN", "--results", "results.json", "--out", "a", "--val"]
    code, out, err = call("make_submission", *argv)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"a/bbox/detections_val_DCN_results.zip: {len(results)} box detections, 0.0 MB")
    for kind in ("bbox", "segm"):
        names = ("AP", "AP50", "AP75", "S", "M", "L")
        figures = zip(names, pycocotools_figures(content, results, kind), strict=True)
        assert f"  {', '.join(f'{name} {value:.1f}' for name, value in figures)} (0 to 100, val)" in lines
        assert (files / "a" / kind / "detections_val_DCN_results.zip").is_file()


def test_dropped_detections_and_empty_images_are_told(files, call):
    entries = [dict(image_id=10, category_id=2, bbox=[i, 1, 5, 5], score=i / 200) for i in range(105)]
    write(files / "many.json", entries)
    code, out, _ = call("make_submission", *SET, "--results", "many.json")
    assert code == 0 and "  7 of 8 images have no detection" in out
    assert "  5 detections were left out, beyond the best 100 of an image" in out
    assert (files / "submission/bbox/detections_test-dev_a_results.zip").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*SET], "name detections by --results, or a detector by --config and --checkpoint"),
        ([*SET, "--results", "r.json", "--config", "c.py"], "name detections by --results, or a detector"),
        ([*SET, "--config", "c.py"], "--config needs --checkpoint"),
        ([*SET, "--config", "c.py", "--checkpoint", "c.pth"], "--ann and --image-folder go together"),
        (["--alg", "a", "--results", "r.json"], "--ann is needed"),
        (["--results", "results.json"], "the following arguments are required: --alg"),
    ],
)
def test_bad_arguments(files, call, argv, message):
    code, _, err = call("make_submission", *argv)
    assert code == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*SET, "--results", "gone.json"], "gone.json: the result file cannot be read"),
        ([*SET, "--results", "results.json", "--val"], "there are no annotations to compare with"),
        ([*SET, "--results", "instances_val.json"], "it is not a JSON array of detections"),
        (["--ann", "gone.json", "--alg", "a", "--results", "results.json"], "gone.json: the annotation file cannot"),
        ([*SET[:3], "a b", "--results", "results.json"], "the name 'a b' must be of letters, digits and hyphens"),
        (
            [*SET, "--config", "gone.py", "--checkpoint", "c.pth", "--image-folder", "."],
            "gone.py: there is no such config file",
        ),
    ],
)
def test_refusals(files, call, argv, message):
    code, _, err = call("make_submission", *argv)
    assert code == 1 and message in err and len(err.splitlines()) == 1 and err.startswith("make_submission.py: ")


@pytest.mark.parametrize("framework", CONFIGS)
def test_a_detector_is_run(files, call, results, monkeypatch, framework):
    pytest.importorskip(framework, reason="the framework is not installed")
    inference = importlib.import_module(f"dk_detection.{framework}.inference")
    calls = []

    def detect(config, checkpoint, images, image_folder, folder, **options):
        calls.append((config, checkpoint, image_folder, folder, options))
        shards.claim(folder)
        writer = shards.Writer(folder)
        for image in images.images:
            writer.write(image, without([entry for entry in results if entry["image_id"] == image], "image_id"))

    monkeypatch.setattr(inference, "run", detect)
    argv = [*SET, "--config", str(CONFIGS[framework]), "--checkpoint", "c.pth", "--image-folder", "pictures", "--tta"]
    code, out, err = call("make_submission", *argv, "--cfg-options", "a=1", "b=2")
    assert (code, err) == (0, "") and f"{len(results)} mask detections" in out
    config, checkpoint, image_folder, folder, options = calls[0]
    assert (config, checkpoint, image_folder) == (str(CONFIGS[framework]), "c.pth", "pictures")
    assert folder == f"work_dirs/{CONFIGS[framework].stem}/test-dev_tta"
    own = dict(launcher=None) if framework == "mmdet" else dict(num_gpus=1)
    assert options == dict(tta=True, options=["a=1", "b=2"], **own)

    monkeypatch.setenv("RANK", "1")  # the second of several processes leaves the package to the first
    assert call("make_submission", *argv) == (0, "", "")

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "run", interrupt)
    code, _, err = call("make_submission", *argv)
    assert code == 130 and "interrupted; what is finished is kept, and the same command goes on" in err


def test_from_a_shell(files, results):
    command = [sys.executable, TOOLS / "make_submission.py", *SET, "--results", "results.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and not done.stderr and str(len(results)) in done.stdout
    assert json.loads((files / "results.json").read_text()) == results
