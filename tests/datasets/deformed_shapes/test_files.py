"""What all tasks share: the same bytes again, wrong parameters, files of others, interruptions, the command line."""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dk_detection.datasets import deformed_shapes
from dk_detection.datasets.deformed_shapes import __main__ as command_line

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Task:
    """One of the data sets, a few images of it, and the file that is written last."""

    name: str
    small: dict
    last: str

    @property
    def module(self) -> ModuleType:
        return import_module(f"dk_detection.datasets.deformed_shapes.{self.name}")

    def make(self, root, **arguments) -> bool:
        return self.module.make(root, **{**self.small, **arguments})


DETECTION = Task(
    "detection",
    dict(seed=3, num_train=4, num_val=2, num_test=1, image_size=64),
    "annotations/image_info_test-dev.json",
)
CLASSIFICATION = Task("classification", dict(seed=3, num_train=13, num_val=6, image_size=32), "meta/val.csv")
SEGMENTATION = Task("segmentation", dict(seed=3, num_train=4, num_val=2, image_size=64), "labels/val/000002.png")
TASKS = {task.name: task for task in (DETECTION, CLASSIFICATION, SEGMENTATION)}


@pytest.fixture(params=TASKS.values(), ids=TASKS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A finished data set of each task."""
    roots = {name: tmp_path_factory.mktemp("data") / name for name in TASKS}
    for name, task in TASKS.items():
        assert task.make(roots[name])
    return roots


def contents(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_package_offers_all():
    assert deformed_shapes.make is DETECTION.module.make
    assert deformed_shapes.make_classification is CLASSIFICATION.module.make
    assert deformed_shapes.make_segmentation is SEGMENTATION.module.make


def test_same_bytes_again(task, roots, tmp_path):
    task.make(tmp_path)
    assert contents(tmp_path) == contents(roots[task.name])


def test_pictures_do_not_depend_on_their_number(task, roots, tmp_path):
    task.make(tmp_path, num_train=task.small["num_train"] + 6)
    before, more = contents(roots[task.name]), contents(tmp_path)
    pictures = {name for name in before if name.endswith(".png")}
    assert {name: more[name] for name in pictures} == {name: before[name] for name in pictures}


@pytest.mark.parametrize(
    ("task", "arguments", "error", "message"),
    [
        (DETECTION, dict(difficulty=1.5), ValueError, "difficulty is 1.5, expected a number from 0 to 1"),
        (DETECTION, dict(difficulty=-0.1), ValueError, "difficulty is -0.1"),
        (DETECTION, dict(difficulty="easy"), TypeError, "difficulty is 'easy', expected a number from 0 to 1"),
        (DETECTION, dict(difficulty=float("nan")), ValueError, "difficulty is nan"),
        (DETECTION, dict(image_size=63), ValueError, "image_size is 63, expected at least 64"),
        (DETECTION, dict(image_size=128.0), TypeError, "image_size is 128.0, expected an integer"),
        (DETECTION, dict(seed=-1), ValueError, "seed is -1, expected at least 0"),
        (DETECTION, dict(num_train=-1), ValueError, "num_train is -1, expected at least 0"),
        (DETECTION, dict(num_val=-2), ValueError, "num_val is -2"),
        (DETECTION, dict(num_test="3"), TypeError, "num_test is '3', expected an integer"),
        (CLASSIFICATION, dict(scale=1.01), ValueError, "scale is 1.01, expected a number from 0 to 1"),
        (CLASSIFICATION, dict(rotation=-1), ValueError, "rotation is -1, expected a number from 0 to 1"),
        (CLASSIFICATION, dict(shear=None), TypeError, "shear is None, expected a number from 0 to 1"),
        (CLASSIFICATION, dict(warp=float("nan")), ValueError, "warp is nan"),
        (CLASSIFICATION, dict(difficulty=2), ValueError, "difficulty is 2"),
        (CLASSIFICATION, dict(image_size=31), ValueError, "image_size is 31, expected at least 32"),
        (CLASSIFICATION, dict(seed=0.5), TypeError, "seed is 0.5, expected an integer"),
        (CLASSIFICATION, dict(num_train=5), ValueError, "num_train is 5, expected at least 6"),
        (CLASSIFICATION, dict(num_val=0), ValueError, "num_val is 0, expected at least 6"),
        (SEGMENTATION, dict(difficulty=1.5), ValueError, "difficulty is 1.5, expected a number from 0 to 1"),
        (SEGMENTATION, dict(image_size=63), ValueError, "image_size is 63, expected at least 64"),
        (SEGMENTATION, dict(num_train=0), ValueError, "num_train is 0, expected at least 1"),
        (SEGMENTATION, dict(num_val=0.5), TypeError, "num_val is 0.5, expected an integer"),
    ],
)
def test_wrong_parameters(tmp_path, task, arguments, error, message):
    with pytest.raises(error, match=f"^deformed_shapes: {message}"):
        task.make(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "mine"),
        ("dataset.json", "not json"),
        ("dataset.json", "[]"),
        ("dataset.json", '{"format": {"name": "other"}, "parameters": {}}'),
        ("dataset.json", '{"format": {"name": "deformed_shapes"}, "parameters": {}}'),
    ],
)
def test_folder_of_others_is_refused(task, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/000001.png").write_bytes(b"a picture")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="nothing was changed"):
        task.make(tmp_path)
    assert contents(tmp_path) == before


def test_folder_of_the_other_task_is_refused(task, roots):
    other = next(name for name in TASKS if name != task.name)
    before = contents(roots[other])
    with pytest.raises(FileExistsError, match=r"a data set of the same kind \(deformed_shapes.*nothing was changed"):
        task.make(roots[other])
    assert contents(roots[other]) == before


def test_file_is_refused(task, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        task.make(tmp_path / "file")


def test_finished_data_set_is_not_made_again(task, roots, monkeypatch):
    monkeypatch.setattr(task.module, "sample", None)
    size = task.small["image_size"]
    assert task.make(roots[task.name]) is False
    assert task.make(str(roots[task.name]), difficulty=np.float64(0.25), image_size=np.int64(size)) is False


@pytest.mark.parametrize(
    ("task", "other"),
    [
        (DETECTION, dict(seed=4)),
        (DETECTION, dict(difficulty=0.4)),
        (DETECTION, dict(num_train=2)),
        (DETECTION, dict(image_size=65)),
        (CLASSIFICATION, dict(shear=0)),
        (CLASSIFICATION, dict(num_train=8)),
        (SEGMENTATION, dict(num_train=2)),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else next(iter(value)),
)
def test_other_parameters_make_it_anew(tmp_path, task, other):
    task.make(tmp_path / "clean", **other)
    task.make(tmp_path / "old")
    (tmp_path / "old/train/notes.txt").write_text("mine")
    assert task.make(tmp_path / "old", **other)
    made = contents(tmp_path / "old")
    assert made.pop("train/notes.txt") == b"mine"
    assert made == contents(tmp_path / "clean")


def test_lost_file_is_noticed(task, tmp_path):
    task.make(tmp_path)
    before = contents(tmp_path)
    next((tmp_path / "val").rglob("*.png")).unlink()
    assert task.make(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("images", "over_another"), [(0, False), (3, False), (0, True), (5, True)])
def test_interruption_leaves_nothing_that_looks_complete(task, roots, tmp_path, monkeypatch, images, over_another):
    if over_another:
        task.make(tmp_path, seed=9, num_train=8)
    sample, calls = task.module.sample, []

    def interrupted(*args, **kwargs):
        if len(calls) == images:
            raise KeyboardInterrupt
        calls.append(args)
        return sample(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(task.module, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            task.make(tmp_path)
    assert json.loads((tmp_path / "dataset.json").read_text())["complete"] is False
    assert not (tmp_path / task.last).exists()
    assert task.make(tmp_path)
    assert contents(tmp_path) == contents(roots[task.name])


# The command line.


def run(*arguments) -> None:
    command = [sys.executable, "-m", "dk_detection.datasets.deformed_shapes", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_command_line_makes_a_detection_set(tmp_path, roots):
    sizes = ("--image-size", 64, "--train", 4, "--val", 2, "--test", 1)
    run("--out", tmp_path / "data", "--seed", 3, "--difficulty", 0.25, *sizes)
    assert contents(tmp_path / "data") == contents(roots["detection"])


def test_command_line_makes_a_classification_set(tmp_path, roots):
    dials = ("--scale", 1, "--rotation", 1, "--shear", 1, "--warp", 1)
    sizes = ("--image-size", 32, "--train", 13, "--val", 6)
    run("--task", "classification", "--out", tmp_path / "data", "--seed", 3, *dials, *sizes)
    assert contents(tmp_path / "data") == contents(roots["classification"])


def test_command_line_makes_a_segmentation_set(tmp_path, roots):
    sizes = ("--image-size", 64, "--train", 4, "--val", 2)
    run("--task", "segmentation", "--out", tmp_path / "data", "--seed", 3, *sizes)
    assert contents(tmp_path / "data") == contents(roots["segmentation"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--difficulty", "2"), "difficulty is 2.0, expected a number from 0 to 1"),
        (("--shear", "0.5"), "--shear does not go with --task detection"),
        (("--task", "classification", "--test", "5"), "--test does not go with --task classification"),
        (("--task", "classification", "--shear", "5"), "shear is 5.0, expected a number from 0 to 1"),
        (("--task", "segmentation", "--test", "5"), "--test does not go with --task segmentation"),
        (("--task", "tracking"), "argument --task: invalid choice: 'tracking'"),
    ],
)
def test_command_line_says_what_is_wrong(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        command_line.main(["--out", str(tmp_path / "data"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_needs_no_framework():
    code = """if True:
        import sys
        from dk_detection.datasets import deformed_shapes
        heavy = {"numpy", "cv2", "shapely", "torch"} & sys.modules.keys()
        assert not heavy, f"{heavy}, for the names of the classes"
        deformed_shapes.make, deformed_shapes.make_classification, deformed_shapes.make_segmentation
        heavy = {"torch", "mmcv", "mmdet", "mmengine", "detectron2", "dk_detection._C"} & sys.modules.keys()
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
