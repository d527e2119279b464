"""A classifier on a miniature ImageNet, from the outside, and the detectors that start from what it leaves."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from dk_detection.datasets import deformed_shapes
from tests.tools.command_line import ROOT, refused, running

CONFIG = ROOT / "configs" / "imagenet" / "r50-dw-dk_90e_imagenet.py"
TINY = """
_base_ = '{base}'
classes = ('crescent', 'cross', 'disc', 'square', 'star', 'triangle')
model = dict(backbone=dict(blocks=(1, 1, 1, 1)), head=dict(num_classes=6))
loader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(metainfo=dict(classes=classes)))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
"""
SMALL_IMAGES = (
    "train_dataloader.dataset.pipeline.1.scale=64",
    *(f"{mode}_dataloader.dataset.pipeline.1.scale=72" for mode in ("val", "test")),
    *(f"{mode}_dataloader.dataset.pipeline.2.crop_size=64" for mode in ("val", "test")),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What trains a classifier of one block a stage, the folder of its first epoch, and what was printed."""
    folder = tmp_path_factory.mktemp("imagenet")
    deformed_shapes.make_classification(folder / "data", num_train=12, num_val=6, image_size=32)
    (folder / "tiny.py").write_text(TINY.format(base=CONFIG.as_posix()), encoding="utf-8")
    environment = {"DK_IMAGENET_ROOT": str(folder / "data"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    modules = ("dk_detection.mmengine.train", *(f"mmpretrain.{name}" for name in ("datasets", "evaluation", "models")))
    with running(environment, folder, *modules) as train_net:

        def train(*argv, options=()):
            common = ("--config", folder / "tiny.py", "--work-dir", folder / "run")
            return train_net(*common, *argv, "--cfg-options", *SMALL_IMAGES, *options)

        done = train(options=["train_cfg.max_epochs=1"])
        assert done.code == 0, done.err
        yield train, folder, done


def test_training_says_top_1_and_top_5_and_goes_on(run):
    train, folder, first = run
    figures = r"^val: accuracy/top1 [\d.]+, accuracy/top5 [\d.]+$"
    assert re.search(figures, first.out, re.MULTILINE)
    assert "holds a run already (epoch_1.pth)" in refused(train())
    message = refused(train("--resume", options=["train_dataloader.dataset.data_root=gone"]))
    assert "differ in train_dataloader.dataset.data_root" in message
    done = train("--resume")
    assert done.code == 0, done.err
    assert set(re.findall(r"Epoch\(train\) *\[(\d)\]", done.out)) == {"2"}
    assert (folder / "run" / "epoch_2.pth").is_file()
    last = re.search(figures, done.out, re.MULTILINE)[0]
    done = train("--eval-only")
    assert done.code == 0, done.err
    assert last.replace("val:", "test:") in done.out


def backbone_weights(folder: Path) -> dict:
    """Of the last checkpoint; `backbone.pth` has to be the same."""
    checkpoint = sorted((folder / "run").glob("epoch_*.pth"))[-1]
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    weights = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    saved = torch.load(folder / "run" / "backbone.pth", weights_only=True)
    assert saved.keys() == weights.keys() and any("kernel_offset" in key for key in weights)
    assert all(torch.equal(saved[key], value) for key, value in weights.items())
    return weights


@pytest.mark.parametrize("file", ["backbone.pth", "epoch_1.pth"])
def test_detector_of_mmdetection(run, file, monkeypatch):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    folder = run[1]
    weights = backbone_weights(folder)
    if file == "epoch_1.pth":
        state = torch.load(folder / "run" / file, map_location="cpu", weights_only=False)["state_dict"]
        weights = {key.removeprefix("backbone."): value for key, value in state.items()}
    monkeypatch.setenv("DK_R50_DW_CHECKPOINT", str(folder / "run" / file))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as tools/train_net.py does
    cfg = Config.fromfile(ROOT / "configs" / "mmdet" / "dk" / "faster-rcnn_r50-dw-dk_fpn_1x_coco.py")
    cfg.model.backbone.blocks = (1, 1, 1, 1)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(cfg.model)
    detector.init_weights()
    own = detector.backbone.state_dict()
    assert own.keys() == {key for key in weights if not key.startswith("head.")}
    assert all(torch.equal(weights[key], value) for key, value in own.items())


def test_detector_of_detectron2(run, monkeypatch):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate

    weights = backbone_weights(run[1])
    monkeypatch.setenv("DK_R50_DW_CHECKPOINT", str(run[1] / "run" / "backbone.pth"))
    cfg = LazyConfig.load(str(ROOT / "configs" / "detectron2" / "dk" / "faster-rcnn_r50-dw-dk_fpn_1x_coco.py"))
    cfg.model.network.backbone.bottom_up.blocks = (1, 1, 1, 1)
    detector = instantiate(cfg.model)
    DetectionCheckpointer(detector).load(cfg.train.init_checkpoint)
    own = detector.backbone.bottom_up.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in own.items())
