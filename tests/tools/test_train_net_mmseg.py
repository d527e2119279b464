"""The small segmentor, from the outside, on a few drawn images."""

import json
import re

import pytest

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

from dk_detection.datasets import deformed_shapes
from tests.tools.command_line import ROOT, refused, running

CONFIG = ROOT / "configs" / "mmseg" / "deformed_shapes" / "deeplab_r18-dconv-c5_dc5_1k_deformed-shapes.py"
SMALL = (
    "model.backbone.base_channels=8",
    "model.backbone.stem_channels=8",
    "model.decode_head.in_channels=64",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.interval=2",
    *(f"{mode}_dataloader.{name}" for mode in ("train", "val", "test") for name in ("batch_size=2", "num_workers=0")),
    *(f"{mode}_dataloader.persistent_workers=False" for mode in ("train", "val", "test")),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What trains the segmentor, its work folder, and what was printed when it had two iterations behind it."""
    folder = tmp_path_factory.mktemp("mmseg")
    deformed_shapes.make_segmentation(folder / "data", num_train=4, num_val=3)
    environment = {
        "DK_DEFORMED_SHAPES_SEG_ROOT": str(folder / "data"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    modules = ("dk_detection.mmengine.train", *(f"mmseg.{name}" for name in ("datasets", "evaluation", "models")))
    with running(environment, folder, *modules) as train_net:

        def train(*argv, options=(), iterations=2, **kwargs):
            length = (f"train_cfg.max_iters={iterations}", f"train_cfg.val_interval={iterations}")
            common = ("--config", CONFIG, "--work-dir", folder / "run")
            return train_net(*common, *argv, "--cfg-options", *SMALL, *length, *options, **kwargs)

        done = train()
        assert done.code == 0, done.err
        yield train, folder / "run", done


FIGURES = r"^val: aAcc [\d.]+, mIoU [\d.]+, mAcc [\d.]+, sampling/offset [\d.e-]+.*$"


def test_training_says_miou_and_goes_on(run):
    train, folder, first = run
    assert re.search(FIGURES, first.out, re.MULTILINE)
    assert "Warning" not in first.err
    assert "holds a run already (iter_2.pth)" in refused(train())
    message = refused(train("--resume", options=["train_dataloader.dataset.img_suffix=.jpg"]))
    assert "differ in train_dataloader.dataset.img_suffix" in message
    done = train("--resume", iterations=4)
    assert done.code == 0, done.err
    assert re.findall(r"Iter\(train\) *\[(\d)/4\]", done.out) == ["3", "4"]
    assert (folder / "iter_4.pth").is_file()
    last = re.search(FIGURES, done.out, re.MULTILINE)[0]
    record = json.loads((folder / "val.metrics.json").read_text())
    assert record["iteration"] == 4 and f"mIoU {record['metrics']['mIoU']:g}" in last
    done = train("--eval-only")
    assert done.code == 0, done.err
    assert last.partition(", sampling")[0].replace("val:", "test:") in done.out


def test_data_that_is_missing_is_said(run, tmp_path):
    train, _, _ = run
    gone = {"DK_DEFORMED_SHAPES_SEG_ROOT": str(tmp_path / "gone")}
    message = refused(train("--work-dir", tmp_path / "run", env=gone))
    assert f"there is no folder {tmp_path}/gone" in message and "--task segmentation --out" in message


def test_heads_and_classes_have_to_fit(run, tmp_path):
    train, _, _ = run
    message = refused(train("--work-dir", tmp_path / "run", options=["model.decode_head.num_classes=6"]))
    assert message == "model.decode_head.num_classes is 6, and train_dataloader.dataset has 7 classes"
