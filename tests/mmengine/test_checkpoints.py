"""A checkpoint is whole, fits the model and belongs to the run, or one line says what is wrong."""

import copy
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.config import Config
from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper, ReduceOnPlateauLR
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from dk_detection.errors import UserError
from dk_detection.layers import ModulatedDeformConv2d
from dk_detection.mmengine.checkpoints import (
    bring_to_schedule,
    check_fits,
    check_same_run,
    latest_checkpoint,
    read_checkpoint,
    read_training_state,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "mmdet"
RIGID, MDCONV = (CONFIGS / "dcnv2" / f"faster-rcnn_r50{token}_fpn_1x_coco.py" for token in ("", "-mdconv-c3-c5"))


def refused(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_corrupt_file(tmp_path):
    path = tmp_path / "a.pth"
    assert refused(read_checkpoint, str(path)) == f"{path}: there is no such checkpoint"
    torch.save(dict(state_dict=nn.Conv2d(30, 30, 3).state_dict()), path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert refused(read_checkpoint, str(path)).startswith(
            f"{path}: the checkpoint cannot be read, it is corrupt or incomp"
        )
    path.write_bytes(whole)
    assert read_checkpoint(str(path)).keys() == {"state_dict"}
    torch.save([1, 2], path)
    assert refused(read_checkpoint, str(path)) == f"{path}: this is no checkpoint, it holds a list"


def test_weights_are_no_training_state(tmp_path):
    path = str(tmp_path / "a.pth")
    for content in (dict(), dict(state_dict={}, meta={}), dict(state_dict={}, meta={}, message_hub={}, optimizer={})):
        torch.save(content, path)
        message = refused(read_training_state, path)
        assert message.startswith(f"{path}: the checkpoint has weights only")
        assert message.endswith(f"--cfg-options load_from={path}")


def test_latest_checkpoint(tmp_path):
    assert latest_checkpoint(str(tmp_path)) is None
    assert latest_checkpoint(str(tmp_path / "gone")) is None
    (tmp_path / "iter_8.pth").touch()  # not recorded: it may be half written
    assert latest_checkpoint(str(tmp_path)) is None
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_8.pth"))
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_8.pth")
    copy_ = shutil.copytree(tmp_path, tmp_path / "copy")
    assert latest_checkpoint(str(copy_)) == str(copy_ / "iter_8.pth")
    (copy_ / "iter_8.pth").unlink()  # CheckpointHook's out_dir may be another folder
    assert latest_checkpoint(str(copy_)) == str(tmp_path / "iter_8.pth")


def test_fit():
    rigid = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    deformable = nn.Sequential(ModulatedDeformConv2d(3, 4, 3), nn.BatchNorm2d(4))
    for state in (rigid.state_dict(), dict(state_dict=rigid.state_dict())):
        check_fits(rigid, state, "a.pth")
        check_fits(deformable, state, "a.pth")  # lifted
    check_fits(rigid, dict(state_dict={f"module.{k}": v for k, v in rigid.state_dict().items()}), "a.pth")
    message = refused(check_fits, rigid, deformable.state_dict(), "a.pth")
    assert message.startswith("a.pth: the checkpoint does not fit the model of this config: unexpected key")
    assert "0.conv_offset.weight" in message
    state = rigid.state_dict()
    del state["1.weight"]
    assert "missing keys in source state_dict: 1.weight" in refused(check_fits, rigid, state, "a.pth")
    assert "size mismatch for 0.weight" in refused(
        check_fits, rigid, nn.Sequential(nn.Conv2d(3, 5, 3)).state_dict(), "a.pth"
    )
    assert len(refused(check_fits, rigid, {f"{'x' * 90}{i}": state["1.bias"] for i in range(99)}, "a.pth")) < 600


@pytest.fixture(scope="module")
def run():
    """The config of a run and the checkpoint that it left."""
    cfg = Config.fromfile(MDCONV)
    return cfg, dict(meta=dict(cfg=cfg.pretty_text))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        {"work_dir": "elsewhere", "launcher": "pytorch", "train_cfg.max_epochs": 99, "randomness.seed": 3},
        {"default_hooks.logger.interval": 1, "default_hooks.checkpoint.max_keep_ckpts": 1, "log_level": "ERROR"},
        {"train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False},
        {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.loss_scale": "dynamic"},
        {"model.backbone.init_cfg": None, "load_from": "x.pth", "resume": True},
        {"train_dataloader.dataset.data_root": "data//coco"},
        {"model.test_cfg.rcnn.score_thr": 0.5},
    ],
)
def test_same_run(run, options):
    cfg = copy.deepcopy(run[0])
    cfg.merge_from_dict(options)
    check_same_run(cfg, run[1], "a.pth")


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"model.backbone.depth": 101}, "model.backbone.depth (50 there, 101 here)"),
        ({"model.backbone.dcn.offset_groups": 4}, "model.backbone.dcn.offset_groups (1 there, 4 here)"),
        (
            {"model.backbone.stage_with_dcn": (False, False, True, True)},
            "model.backbone.stage_with_dcn[1] (True there, Fal",
        ),
        (
            {"train_dataloader.dataset.data_root": "other"},
            "train_dataloader.dataset.data_root (data/coco/ there, other here)",
        ),
        (
            {"train_dataloader.dataset.pipeline.3.prob": 0.1},
            "train_dataloader.dataset.pipeline[3].prob (0.5 there, 0.1 here)",
        ),
        ({"optim_wrapper.optimizer.lr": 0.1}, "optim_wrapper.optimizer.lr (0.02 there, 0.1 here)"),
        ({"val_dataloader": None}, "val_dataloader.dataset ("),
    ],
)
def test_other_run(run, options, difference):
    cfg = copy.deepcopy(run[0])
    cfg.merge_from_dict(options)
    message = refused(check_same_run, cfg, run[1], "a.pth")
    assert message.startswith(f"a.pth belongs to the run of another config; they differ in {difference}")
    assert "Choose another --work-dir" in message


def test_other_config(run):
    message = refused(check_same_run, Config.fromfile(RIGID), run[1], "a.pth")
    assert re.search(r"model\.backbone\.dcn \(\{.*DkModula.* there, None here\)", message)
    cfg = Config.fromfile(CONFIGS / "dcnv2" / "mask-rcnn_r50_fpn_1x_coco.py")
    message = refused(check_same_run, cfg, run[1], "a.pth")
    assert message.count(" here)") == 3
    assert " more. Choose" in message


def test_unreadable_config(run):
    message = refused(check_same_run, run[0], dict(meta=dict(cfg="model = dict(")), "a.pth")
    assert message.startswith("a.pth: the config that the checkpoint was trained with cannot be read")


# Settings with which a run may go on.


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"train_dataloader.batch_size": 1}, "train_dataloader.batch_size (2 there, 1 here)"),
        ({"param_scheduler.1.milestones": [6, 9]}, "param_scheduler[1].milestones[0] (8 there, 6 here)"),
        ({"param_scheduler.0.end": 1000}, "param_scheduler[0].end (500 there, 1000 here)"),
        ({"param_scheduler.1.gamma": 0.2}, "param_scheduler[1].gamma (0.1 there, 0.2 here)"),
        ({"param_scheduler": []}, "param_scheduler ("),
        ({"optim_wrapper.clip_grad": dict(max_norm=35)}, "optim_wrapper.clip_grad (None there, {'max_norm': 35} here)"),
        ({"train_cfg.max_epochs": 24}, "train_cfg.max_epochs (12 there, 24 here)"),
    ],
)
def test_what_a_run_goes_on_with_is_told(run, options, difference):
    cfg = copy.deepcopy(run[0])
    assert check_same_run(cfg, run[1], "a.pth") == []
    cfg.merge_from_dict(options)
    assert check_same_run(cfg, run[1], "a.pth")[0].startswith(difference)


def trained_with(loop: type, epoch_length: int, warmup: int, milestones: list[int], steps: int = 0):
    """A runner after some steps, as far as its schedule goes, and a checkpoint of it."""
    optimizer = OptimWrapper(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.8, momentum=0.9))
    runner = SimpleNamespace(
        train_loop=object.__new__(loop),
        train_dataloader=range(epoch_length),
        optim_wrapper=optimizer,
        param_schedulers=[
            LinearLR(optimizer, start_factor=0.5, begin=0, end=warmup, by_epoch=False),
            MultiStepLR(optimizer, milestones=milestones, gamma=0.1, by_epoch=loop is EpochBasedTrainLoop),
        ],
    )
    for i in range(steps):
        optimizer.step()
        for scheduler in runner.param_schedulers:
            if not scheduler.by_epoch or (i + 1) % epoch_length == 0:
                scheduler.step()
    checkpoint = dict(
        meta=dict(iter=steps, epoch=steps // epoch_length if loop is EpochBasedTrainLoop else 0),
        optimizer=copy.deepcopy(optimizer.state_dict()),
        param_schedulers=[copy.deepcopy(scheduler.state_dict()) for scheduler in runner.param_schedulers],
    )
    return runner, checkpoint


@pytest.mark.parametrize("loop", [EpochBasedTrainLoop, IterBasedTrainLoop])
@pytest.mark.parametrize(("warmup", "milestones"), [(7, [3, 5]), (40, [1, 2]), (2, [4]), (5, [9])])
def test_another_schedule_goes_on_as_if_it_had_been_so_from_the_start(loop, warmup, milestones):
    _, checkpoint = trained_with(loop, 3, 5, [2, 6], steps=12)
    whole, expected = trained_with(loop, 3, warmup, milestones, steps=12)
    runner, _ = trained_with(loop, 3, warmup, milestones)
    bring_to_schedule(checkpoint, runner)
    assert checkpoint["meta"]["iter"] == 12
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(whole.optim_wrapper.get_lr()["lr"][0])
    for ours, theirs in zip(checkpoint["param_schedulers"], expected["param_schedulers"], strict=True):
        assert (ours["last_step"], ours.get("milestones")) == (theirs["last_step"], theirs.get("milestones"))


def test_another_batch_changes_the_count_of_iterations():
    _, checkpoint = trained_with(EpochBasedTrainLoop, 3, 5, [2, 6], steps=9)
    runner, _ = trained_with(EpochBasedTrainLoop, 6, 5, [2, 6])  # half the batch
    bring_to_schedule(checkpoint, runner)
    assert checkpoint["meta"] == dict(iter=18, epoch=3)
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.08)
    assert checkpoint["param_schedulers"][0]["last_step"] == 4  # the warm-up is over
    assert checkpoint["param_schedulers"][1]["last_step"] == 3


def test_schedule_that_depends_on_results():
    _, checkpoint = trained_with(EpochBasedTrainLoop, 3, 5, [2], steps=3)
    runner, _ = trained_with(EpochBasedTrainLoop, 3, 5, [2])
    runner.param_schedulers.append(ReduceOnPlateauLR(runner.optim_wrapper))
    assert refused(bring_to_schedule, checkpoint, runner).startswith(
        "param_scheduler: a schedule of several optimisers"
    )


def test_clipping_is_that_of_the_config():
    """Not brought back from a checkpoint: MMEngine keeps it out of what it saves."""
    parameters = list(nn.Linear(2, 2).parameters())
    old, new = (OptimWrapper(torch.optim.SGD(parameters, 0.1), clip_grad=dict(max_norm=norm)) for norm in (1, 2))
    new.load_state_dict(old.state_dict())
    assert new.clip_grad_kwargs == dict(max_norm=2)
