"""The command line, from the outside: what it prints, leaves behind and returns."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dk_detection.datasets import deformed_shapes
from dk_detection.errors import UserError
from dk_detection.mmengine.options import load_config
from tests import voc
from tests.tools.command_line import ROOT, SCRIPT, Done, plain, refused, running, without

CONFIG = ROOT / re.search(r"^CONFIG \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
COCO_CONFIG = ROOT / "configs" / "mmdet" / "dcnv2" / "faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py"

# The config of `make train`, made tiny: 4 iterations of 2 images, a checkpoint every second.
TINY = """
_base_ = '{base}'
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    deformed_shapes.make(root, num_train=4, num_val=3, num_test=1)
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY.format(base=CONFIG.as_posix()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def environment(data):
    return {"DK_DEFORMED_SHAPES_ROOT": str(data), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def train_net(environment, tmp_path_factory):
    with running(
        environment, tmp_path_factory.mktemp("run"), "dk_detection.mmengine.train", "dk_detection.mmdet"
    ) as run:
        yield run


@pytest.fixture(scope="module")
def trained(train_net, config, tmp_path_factory):
    """A finished run and what it printed. Tests that change the folder take a copy."""
    work_dir = tmp_path_factory.mktemp("trained") / "run"
    done = train_net("--config", config, "--work-dir", work_dir)
    assert done.code == 0, done.err
    return work_dir, done


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def half_way(copied):
    """The run as it was after its second iteration."""
    for path in (copied / "iter_4.pth", copied / "contact_sheet.png", *copied.glob("val.*")):
        path.unlink()
    (copied / "last_checkpoint").write_text(str(copied / "iter_2.pth"))
    return copied


def snapshot(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def iterations(done: Done) -> list[int]:
    return [int(number) for number in re.findall(r"Iter\(train\) *\[ *(\d+)/4\]", done.out)]


# Arguments. These fail before a framework is loaded.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "which config? Write --config CONFIG, for example one of configs/mmdet or configs/detectron2 "
            "(--help lists the options)",
        ),
        (["--config", "gone.py"], "gone.py: there is no such config file"),
        (["gone.py", "--resume"], "gone.py: there is no such config file"),
        (["--config", "model.pth"], "model.pth: a config file ends in .py, .json, .yaml or .yml"),
        (["--config", CONFIG, "--no-such"], "unrecognized arguments: --no-such (--help lists the options)"),
        (["--config", CONFIG, "--checkpoint", "a.pth"], "--checkpoint goes with --eval-only; --resume CKPT continues"),
        (
            ["--config", CONFIG, "--eval-only", "--resume"],
            "--resume continues a training; --eval-only takes --checkpoint CKPT",
        ),
        (
            ["--config", CONFIG, "--num-gpus", "8"],
            f"--num-gpus is no option of MMEngine, which {CONFIG} is for: write `torchrun",
        ),
        ([CONFIG, "--dist-url", "tcp://a:1"], "--dist-url is no option of MMEngine"),
        (["--config", CONFIG, "SOLVER.BASE_LR", "0.1"], "SOLVER.BASE_LR 0.1 is no option of MMEngine"),
        ([CONFIG, "SOLVER.BASE_LR", "0.1"], "SOLVER.BASE_LR 0.1 is no option of MMEngine"),
        (["--cfg-options", "test_evaluator.ann_file=x.json", "gone.py"], "gone.py: there is no such config file"),
    ],
)
def test_arguments(argv, message):
    assert refused(plain(*argv)).startswith(message)


def test_help():
    done = plain("--help")
    assert done.code == 0
    for text in (
        "--config",
        "--resume",
        "--eval-only",
        "--work-dir",
        "--amp",
        "--auto-scale-lr",
        "--cfg-options",
        "--launcher",
    ):
        assert text in done.out
    assert "trust" in done.out


def test_framework_that_is_not_installed(tmp_path):
    message = refused(plain("--config", CONFIG, env=without("mmdet", tmp_path)))
    assert message.startswith(f"{CONFIG}: the config cannot be loaded (ImportError: dk_detection.mmdet needs")
    assert "pip install" in message


# Configs and data.


def test_work_folder_is_named_after_the_config(train_net, config):
    message = refused(train_net("--eval-only", "--config", config))
    assert message == "--eval-only: work_dirs/tiny holds no checkpoint; name one with --checkpoint CKPT"


def test_config_that_cannot_be_loaded(train_net, tmp_path):
    path = tmp_path / "config.py"
    for text, reason in (
        ("_base_ = 'gone.py'", "FileNotFoundError"),
        ("custom_imports = dict(imports=['no_such_module'])", "Failed to import no_such_module"),
        ("default_scope = 'mmdet'\na = 1 / 0", "ZeroDivisionError: division by zero"),
    ):
        path.write_text(text)
        message = refused(train_net("--config", path))
        assert message.startswith(f"{path}: the config cannot be loaded (")
        assert reason in message
    path.write_text("model = dict(type='MaskRCNN')\ntrain_cfg = dict(max_iters=1)")
    assert refused(train_net("--config", path)) == f"{path}: the config sets no train_dataloader"
    assert refused(train_net("--config", path, "--eval-only")) == f"{path}: the config sets no test_cfg"


def test_options(train_net, config, tmp_path):
    common = ("--config", config, "--work-dir", tmp_path / "run")
    assert refused(train_net(*common, "--cfg-options", "model.depth")).startswith(
        "--cfg-options model.depth: expected KEY=VALUE"
    )
    assert refused(train_net(*common, "--amp")).startswith("--amp: MMEngine trains with mixed precision on a GPU only")
    assert refused(train_net(*common, "--auto-scale-lr")).startswith(
        f"--auto-scale-lr: {config} lacks auto_scale_lr=dict("
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        # A variable of the config
        ("train_pipeline.3.prob=0.1", ": write train_dataloader.dataset.pipeline.3.prob"),
        ("metainfo.classes=(a,b)", ": write train_dataloader.dataset.metainfo.classes, val_dataloader.dataset.met"),
        ("data_root=elsewhere", ": write train_dataloader.dataset.data_root, val_dataloader.dataset.data_root, test_"),
        ("roi_extractor.out_channels=3", ": write model.roi_head.bbox_roi_extractor.out_channels, model.roi_head.mask"),
        ("vis_backends.0.type=TensorboardVisBackend", ": write visualizer.vis_backends.0.type"),
        (
            "custom_imports.imports=[x]",
            "custom_imports is a variable, from which the config has made its settings already",
        ),
        # A slip of the pen
        ("modle.backbone.depth=50", "there is no setting modle; did you mean model?"),
        ("model.backbone.frozen_stage=1", "did you mean model.backbone.frozen_stages?"),
        ("optim_wrapper.optimizer.lrr=1", "did you mean optim_wrapper.optimizer.lr?"),
        ("train_cfg.max_iter=3", "did you mean train_cfg.max_iters?"),
        ("default_hooks.checkpoint.max_keep_ckpt=3", "did you mean default_hooks.checkpoint.max_keep_ckpts?"),
        ("model.test_cfg.rcnn.score_thresh=0.5", "did you mean model.test_cfg.rcnn.score_thr?"),
        ("train_dataloader.batchsize=3", "did you mean train_dataloader.batch_size?"),
        ("max_epochs=3", "there is no setting max_epochs"),
        ("train_dataloader.dataset.pipeline.3.chance=1", "no setting train_dataloader.dataset.pipeline.3.chance"),
        # A place that there is not
        ("train_dataloader.dataset.pipeline.9.prob=1", "train_dataloader.dataset.pipeline has 5 elements, 0 to 4"),
        (
            "param_scheduler.milestones=[1]",
            "param_scheduler is a list, write param_scheduler.0, param_scheduler.1, ...",
        ),
        ("train_cfg.max_iters.x=3", "train_cfg.max_iters is 4 and has no x; set it as a whole"),
        # No setting at all
        ("randomness.seed=[(1,2]", "the value cannot be read (Imbalanced brackets exist"),
        ("seed", "expected KEY=VALUE"),
    ],
)
def test_option_without_an_effect(config, option, message):
    with pytest.raises(UserError) as error:
        load_config(str(config), [option])
    assert str(error.value).startswith("--cfg-options ")
    assert message in str(error.value)


def test_options_that_the_config_does_not_have(config, capsys):
    options = {
        "model.neck.no_norm_on_lateral": True,
        "optim_wrapper.accumulative_counts": 2,
        "optim_wrapper.optimizer.type": "SGD",
        "optim_wrapper.optimizer.momentum": 0.9,  # an argument of the type that is given
        "default_hooks.checkpoint.save_best": "auto",
        "train_dataloader.dataset.indices": 3,
        "find_unused_parameters": True,
    }
    cfg = load_config(str(config), [f"{key}={value}" for key, value in options.items()])
    for key, value in options.items():
        assert functools.reduce(lambda node, name: node[name], key.split("."), cfg) == value
    assert capsys.readouterr().out == ""
    load_config(str(config), ["model.test_cfg.rcnn.new=0.3"])  # nobody can tell whether it is read
    assert capsys.readouterr().out.startswith(
        "--cfg-options model.test_cfg.rcnn.new: the config does not have it so far"
    )


@pytest.mark.parametrize(
    "text",
    [
        "data = dict(train=dict(type='CocoDataset'))\noptimizer = dict(type='SGD')\nrunner = dict(max_epochs=12)",
        "model = dict(type='FasterRCNN')\ndata = dict(samples_per_gpu=2)",
        "optimizer = dict(type='SGD')\nlr_config = dict(policy='step')\ntotal_epochs = 12",
        "checkpoint_config = dict(interval=1)\nrunner = dict(type='EpochBasedRunner', max_epochs=12)",
    ],
)
def test_config_from_before_mmengine(tmp_path, text):
    path = tmp_path / "old.py"
    path.write_text(text)
    with pytest.raises(
        UserError, match=r"old.py is a config from before MMEngine, .* \(it sets .*config_migration.html"
    ):
        load_config(str(path))


def test_work_folder_that_cannot_be_made(train_net, config, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        message = refused(train_net("--config", config, "--work-dir", path))
        assert message == f"--work-dir {path}: the folder cannot be made ({reason})"
    assert (tmp_path / "file").read_text() == "mine"


def test_data(train_net, config, data, tmp_path):
    """The messages themselves are tested with `check_data`; here, that the command line asks it in each mode."""
    common = ("--config", config, "--work-dir", tmp_path / "run")
    gone = {"DK_DEFORMED_SHAPES_ROOT": "nowhere"}
    message = refused(train_net(*common, env=gone))
    assert message.startswith(
        "train_dataloader.dataset: there is no annotation file nowhere/annotations/instances_train.json;"
    )
    assert "python -m dk_detection.datasets.deformed_shapes --out nowhere/" in message
    assert "DK_DEFORMED_SHAPES_ROOT" in message
    broken = shutil.copytree(data, tmp_path / "broken")
    path = broken / "annotations" / "instances_val.json"
    path.write_text(path.read_text()[:1000])
    message = refused(train_net(*common, env={"DK_DEFORMED_SHAPES_ROOT": str(broken)}))
    assert message.startswith(f"val_dataloader.dataset: the annotation file {path} is broken: it is not valid JSON")
    assert not (tmp_path / "run").exists()


# Runs.


def test_training_leaves_everything_in_one_folder(trained):
    work_dir, done = trained
    assert iterations(done) == [1, 2, 3, 4]
    assert re.search(r"Iter\(train\).*eta: \d:\d\d:\d\d", done.out)
    assert {path.name for path in work_dir.glob("*.*")} == {
        "iter_2.pth",
        "iter_4.pth",
        "contact_sheet.png",
        "tiny.py",
        "val.bbox.json",
        "val.metrics.json",
        "val.segm.json",
    }
    assert len(list(work_dir.glob("*/*.log"))) == 1
    record = json.loads((work_dir / "val.metrics.json").read_text())
    assert record["iteration"] == 4
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= record["metrics"].keys()
    assert isinstance(json.loads((work_dir / "val.bbox.json").read_text()), list)
    assert re.search(r"^val: box AP \d+\.\d, mask AP \d+\.\d \(COCO metric, 0 to 100\)$", done.out, re.MULTILINE)
    assert done.out.endswith(f"Everything is in {work_dir}\n")
    assert "Traceback" not in done.err


def test_finished_run_is_left_alone(train_net, config, trained):
    work_dir, first = trained
    before = snapshot(work_dir)
    done = train_net("--config", config, "--work-dir", work_dir, "--resume")
    assert done.code == 0, done.err
    assert f"{work_dir}/iter_4.pth: the training is finished and evaluated." in done.out
    assert done.out.splitlines()[-2:] == first.out.splitlines()[-2:]
    assert snapshot(work_dir) == before
    message = refused(train_net("--config", config, "--work-dir", work_dir))
    assert message == (
        f"{work_dir} holds a run already (iter_4.pth): continue it with --resume, or choose another --work-dir"
    )
    assert snapshot(work_dir) == before


@pytest.mark.parametrize("lost", ["val.metrics.json", "val.segm.json"])
def test_finished_training_without_results_is_evaluated(train_net, config, trained, copied, lost):
    results = json.loads((copied / "val.metrics.json").read_text())
    (copied / lost).unlink()
    (copied / "contact_sheet.png").unlink()
    done = train_net("--config", config, "--work-dir", copied, "--resume")
    assert done.code == 0, done.err
    assert f"{copied}/iter_4.pth: the training is finished; evaluating." in done.out
    assert iterations(done) == []
    assert done.out.splitlines()[-2] == trained[1].out.splitlines()[-2]
    record = json.loads((copied / "val.metrics.json").read_text())
    assert (record["iteration"], record["metrics"]) == (4, results["metrics"])
    assert record["files"] == ["val.bbox.json", "val.segm.json"]
    assert all((copied / name).is_file() for name in [*record["files"], "contact_sheet.png"])


def test_resume_continues(train_net, config, half_way):
    done = train_net("--config", config, "--work-dir", half_way, "--resume")
    assert done.code == 0, done.err
    assert iterations(done) == [3, 4]
    assert (half_way / "last_checkpoint").read_text().endswith("iter_4.pth")
    assert json.loads((half_way / "val.metrics.json").read_text())["iteration"] == 4


def test_resume_from_a_named_checkpoint_into_another_folder(train_net, config, trained, tmp_path):
    before = snapshot(trained[0])
    work_dir = tmp_path / "other"
    done = train_net("--config", config, "--work-dir", work_dir, "--resume", trained[0] / "iter_2.pth")
    assert done.code == 0, done.err
    assert iterations(done) == [3, 4]
    assert snapshot(trained[0]) == before


def test_resume_in_an_empty_folder_starts_from_scratch(train_net, config, tmp_path):
    options = ("--cfg-options", "train_cfg.max_iters=1", "val_cfg=None", "val_dataloader=None", "val_evaluator=None")
    done = train_net("--config", config, "--work-dir", tmp_path / "new", "--resume", *options)
    assert done.code == 0, done.err
    assert f"{tmp_path}/new holds no checkpoint yet: starting from scratch." in done.out
    assert (tmp_path / "new" / "iter_1.pth").is_file()


def test_resume_with_another_schedule_and_batch(train_net, config, half_way):
    options = ("param_scheduler.0.end=3", "train_dataloader.batch_size=1", "optim_wrapper.clip_grad.max_norm=9")
    done = train_net("--config", config, "--work-dir", half_way, "--resume", "--cfg-options", *options)
    assert done.code == 0, done.err
    for text in (
        "param_scheduler[0].end (100 there, 3 here).",
        "train_dataloader.batch_size (2 there, 1 here).",
        "optim_wrapper.clip_grad.max_norm (5 there, 9 here).",
    ):
        assert f"{half_way}/iter_2.pth: the run goes on with another {text}\n" in done.out
    # The warm-up has ended with the second iteration, where that of the checkpoint would have begun.
    assert re.findall(r"Iter\(train\) *\[([34])/4\] +base_lr: ([0-9.e+-]+)", done.out) == [
        ("3", "1.0000e-03"),
        ("4", "1.0000e-03"),
    ]


def test_nothing_to_compare_with(train_net, config, trained, data, tmp_path):
    root = shutil.copytree(data, tmp_path / "shapes")
    path = root / "annotations" / "instances_val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    argv = (
        "--config",
        config,
        "--work-dir",
        tmp_path / "run",
        "--eval-only",
        "--checkpoint",
        trained[0] / "iter_4.pth",
    )
    options = ("--cfg-options", "model.test_cfg.rcnn.score_thr=0.0")
    done = train_net(*argv, *options, env={"DK_DEFORMED_SHAPES_ROOT": str(root)})
    assert done.code == 0, done.err
    assert f"{path}: judged: 0 of 0 objects" in done.out
    assert done.out.splitlines()[-2] == "test: box AP undefined, mask AP undefined (COCO metric, 0 to 100)"


def test_other_config_in_the_work_folder(train_net, config, half_way, tmp_path):
    before = snapshot(half_way)
    twin = CONFIG.with_name("mask-rcnn_r18_fpn_1k_deformed-shapes.py")
    rigid = tmp_path / "rigid.py"
    rigid.write_text(TINY.format(base=twin.as_posix()))
    message = refused(train_net("--config", rigid, "--work-dir", half_way, "--resume"))
    assert message.startswith(
        f"{half_way}/iter_2.pth belongs to the run of another config; they differ in model.backbone."
    )
    assert "--work-dir" in message
    assert "holds a run already" in refused(train_net("--config", rigid, "--work-dir", half_way))
    options = ("--cfg-options", "model.roi_head.mask_head.num_convs=3")
    message = refused(train_net("--config", config, "--work-dir", half_way, "--resume", *options))
    assert re.search(r"differ in model\.roi_head\.mask_head\.num_convs \(\d there, 3 here\)\.", message)
    assert snapshot(half_way) == before


def test_corrupt_checkpoint(train_net, config, half_way, tmp_path):
    path = half_way / "iter_2.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    before = snapshot(half_way)
    expected = f"{path}: the checkpoint cannot be read, it is corrupt or incomplete ("
    common = ("--config", config, "--work-dir", half_way)
    assert refused(train_net(*common, "--resume")).startswith(expected)
    assert refused(train_net(*common, "--resume", path)).startswith(expected)
    assert refused(train_net(*common, "--eval-only", "--checkpoint", path)).startswith(expected)
    assert snapshot(half_way) == before
    fresh = ("--config", config, "--work-dir", tmp_path / "fresh")
    assert refused(train_net(*fresh, "--cfg-options", f"load_from={path}")).startswith(expected)
    init_cfg = f"model.backbone.init_cfg=dict(type='Pretrained', checkpoint='{path}')"
    assert refused(train_net(*fresh, "--cfg-options", init_cfg)).startswith(("--cfg-options", expected))
    assert not (tmp_path / "fresh").exists()


def test_eval_only(train_net, config, trained, tmp_path):
    work_dir = tmp_path / "evaluated"
    done = train_net(
        "--config", config, "--work-dir", work_dir, "--eval-only", "--checkpoint", trained[0] / "iter_4.pth"
    )
    assert done.code == 0, done.err
    assert {"test.bbox.json", "test.segm.json", "test.metrics.json", "contact_sheet.png"} <= set(os.listdir(work_dir))
    assert done.out.splitlines()[-2] == trained[1].out.splitlines()[-2].replace("val:", "test:")
    assert json.loads((work_dir / "test.bbox.json").read_text()) == json.loads(
        (trained[0] / "val.bbox.json").read_text()
    )


def test_pascal_voc(train_net, tmp_path):
    """A narrow network on a miniature of its folders; the figures are VOC's."""
    base = ROOT / "configs" / "mmdet" / "dcnv1" / "class-aware-rpn_r101_dc5_30k_voc0712.py"
    narrow = (
        "backbone=dict(depth=50, base_channels=8, stem_channels=8, init_cfg=None), neck=dict(in_channels=256)"
        ", train_cfg=dict(allowed_border=-1), test_cfg=dict(score_thr=0.0)"
    )
    (tmp_path / "voc.py").write_text(f"{TINY.format(base=base.as_posix())}model = dict({narrow})\n", encoding="utf-8")
    environment = {"DK_VOC_ROOT": str(voc.make(tmp_path / "data"))}
    done = train_net("--config", tmp_path / "voc.py", "--work-dir", tmp_path / "run", env=environment)
    assert done.code == 0, done.err
    assert done.out.count("2 pictures; 20 of 20 objects of 2 of them are of the classes") == 3
    assert re.search(r"^val: mAP@0\.5 [\d.]+, mAP@0\.7 [\d.]+ \(PASCAL VOC metric, 0 to 100\)$", done.out, re.MULTILINE)
    figures = json.loads((tmp_path / "run" / "val.metrics.json").read_text())["metrics"]
    assert figures.keys() == {"pascal_voc/mAP", "pascal_voc/AP50", "pascal_voc/AP70"}


def test_detector_that_finds_nothing(train_net, config, trained, tmp_path):
    options = ("--cfg-options", "model.test_cfg.rcnn.score_thr=0.99")
    checkpoint = ("--checkpoint", trained[0] / "iter_4.pth")
    done = train_net("--config", config, "--work-dir", tmp_path / "run", "--eval-only", *checkpoint, *options)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-2] == "test: no figures; the log says why"
    assert "The testing results of the whole dataset is empty" in done.out
    assert json.loads((tmp_path / "run" / "test.bbox.json").read_text()) == []


def test_test_dev_is_only_formatted(train_net, config, trained, data, tmp_path):
    options = (
        "--cfg-options",
        "test_dataloader.dataset.ann_file=annotations/image_info_test-dev.json",
        "test_dataloader.dataset.data_prefix.img=test/",
        f"test_evaluator.ann_file={data}/annotations/image_info_test-dev.json",
        "test_evaluator.format_only=True",
        "model.test_cfg.rcnn.score_thr=0.0",
    )
    checkpoint = ("--checkpoint", trained[0] / "iter_4.pth")
    done = train_net("--config", config, "--work-dir", tmp_path / "run", "--eval-only", *checkpoint, *options)
    assert done.code == 0, done.err
    assert {entry["image_id"] for entry in json.loads((tmp_path / "run" / "test.bbox.json").read_text())} == {1}


def test_eval_only_of_a_checkpoint_that_does_not_fit(train_net, config, trained, tmp_path):
    checkpoint = torch.load(trained[0] / "iter_4.pth", map_location="cpu", weights_only=False)
    weights = dict(state_dict=checkpoint["state_dict"])
    weights["state_dict"].pop("neck.fpn_convs.0.conv.weight")
    torch.save(weights, tmp_path / "weights.pth")
    common = ("--config", config, "--work-dir", tmp_path / "run")
    message = refused(train_net(*common, "--eval-only", "--checkpoint", tmp_path / "weights.pth"))
    assert (
        "does not fit the model of this config: missing keys in source state_dict: neck.fpn_convs.0.conv.weight"
        in message
    )
    message = refused(train_net(*common, "--resume", tmp_path / "weights.pth"))
    assert "the checkpoint has weights only, no training can continue from it" in message
    assert "there is no such checkpoint" in refused(train_net(*common, "--eval-only", "--checkpoint", "gone.pth"))


@pytest.mark.parametrize(
    ("number", "to_all", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143)],
    ids=["Ctrl-C in a terminal", "kill", "end of a scheduler's job"],
)
def test_stopped_from_outside(train_net, config, tmp_path, number, to_all, status):
    """The data loader's worker is told as well, or not, and never stays behind."""
    work_dir = tmp_path / "run"
    options = ("train_cfg.max_iters=500", "default_hooks.checkpoint.interval=1", "train_dataloader.num_workers=1")
    last = work_dir / "last_checkpoint"
    argv = ("--config", config, "--work-dir", work_dir, "--cfg-options", *options)
    done = train_net(*argv, signal=number, to_all=to_all, when=last)
    assert done.code == status
    assert not done.left
    path = last.read_text()
    assert done.err.splitlines() == [f"train_net.py: interrupted; the same command with --resume continues from {path}"]
    assert torch.load(path, map_location="cpu", weights_only=False)["meta"]["iter"] > 0
    assert "Iter(train)" in done.out


def test_two_processes_without_a_gpu(train_net, environment, config, tmp_path):
    """They train, with mimicking, and find together what one process finds."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, "--config", config]
    same = ["val_dataloader.batch_size=1", "test_dataloader.batch_size=1", "model.test_cfg.rcnn.score_thr=0.0"]
    # MMEngine leaves each process its own statistics of a normalisation, here there are none.
    same += ["model.neck.norm_cfg=None", "model.backbone.norm_eval=True"]
    options = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "train_dataloader.batch_size=1", *same]
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, *command, "--work-dir", run, "--cfg-options", *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Everything is in {run}\n") == 1
    assert len(re.findall(r"Iter\(train\) *\[[12]/2\].* loss_mimic: ", done.stdout)) == 2
    evaluation = ("--work-dir", tmp_path / "one", "--eval-only", "--checkpoint", run / "iter_2.pth")
    one = train_net("--config", config, *evaluation, "--cfg-options", *same)
    assert one.code == 0, one.err
    for kind in ("bbox", "segm"):
        found = json.loads((run / f"val.{kind}.json").read_text())
        assert {entry["image_id"] for entry in found} == {1, 2, 3}
        assert found == json.loads((tmp_path / "one" / f"test.{kind}.json").read_text())


# Real images.


def test_real_coco(tiny_coco, train_net, tmp_path):
    """The real config on real images, smaller than in earnest: it trains, stops, goes on and evaluates."""
    sizes = [
        f"{pipeline}_dataloader.dataset.pipeline.{step}.scale=(533,320)"
        for pipeline, step in (("train", 2), ("val", 1))
    ]
    options = (
        "--cfg-options",
        "model.backbone.init_cfg=None",
        *sizes,
        "train_dataloader.num_workers=0",
        "train_dataloader.persistent_workers=False",
        "val_dataloader.num_workers=0",
        "val_dataloader.persistent_workers=False",
        "train_dataloader.dataset.indices=4",
        "val_dataloader.dataset.indices=3",
        "train_cfg.max_epochs=2",
        "train_cfg.val_begin=2",
        "model.test_cfg.rcnn.score_thr=0.0",  # a detector that has not learned anything is not sure of anything
        "default_hooks.logger.interval=1",
    )
    common = ("--config", COCO_CONFIG, "--work-dir", tmp_path / "run")
    env = {"DK_COCO_ROOT": str(tiny_coco), "OMP_NUM_THREADS": "2"}
    one_epoch = (*options, "train_cfg.max_epochs=1")
    done = train_net(*common, *one_epoch, env=env)
    assert done.code == 0, done.err
    assert re.findall(r"Epoch\(train\) *\[(\d+)\]\[(\d)/2\]", done.out) == [("1", "1"), ("1", "2")]
    assert not (tmp_path / "run" / "val.bbox.json").exists()
    done = train_net(*common, "--resume", *options, env=env)
    assert done.code == 0, done.err
    assert re.findall(r"Epoch\(train\) *\[(\d+)\]\[(\d)/2\]", done.out) == [("2", "1"), ("2", "2")]
    assert re.search(r"^val: box AP \d+\.\d \(COCO metric, 0 to 100\)$", done.out, re.MULTILINE)
    images = {entry["image_id"] for entry in json.loads((tmp_path / "run" / "val.bbox.json").read_text())}
    known = json.loads((tiny_coco / "annotations" / "instances_val2017.json").read_text())["images"]
    assert images <= {image["id"] for image in known}


def test_torchrun_without_a_gpu(train_net, environment, config, tmp_path):
    """Two processes with an image each train, with mimicking, to the weights of one process with both images."""
    rpn, roi_head, train_cfg = "model.train_cfg.rpn", "model.roi_head", "model.train_cfg"
    options = [
        "train_cfg.max_iters=2",
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=1",
        "optim_wrapper.optimizer.type=SGD",  # AdamW would make whole steps of rounding errors
        "param_scheduler.0.start_factor=1.0",
        # Nothing is left to chance: no flips, all anchors and RoIs count. All images have as many anchors.
        "train_dataloader.dataset.pipeline.3.prob=0.0",
        *(f"{rpn}.assigner.{name}=0.5" for name in ("pos_iou_thr", "neg_iou_thr")),
        *(f"{rpn}.sampler.{option}" for option in ("num=100000", "pos_fraction=1.0")),
        *(f"{train_cfg}.rcnn.sampler.{option}" for option in ("num=1000", "pos_fraction=1.0")),
        "model.mimic.max_rois=1000",
        # MMDetection divides these losses by the number of each process' own RoIs, and MMEngine leaves each process its
        # own statistics of a normalisation.
        *(f"{roi_head}.bbox_head.{name}.loss_weight=0.0" for name in ("loss_cls", "loss_bbox")),
        f"{roi_head}.mask_head.loss_mask.loss_weight=0.0",
        "model.neck.norm_cfg=None",
        "model.backbone.norm_eval=True",
    ]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, "--launcher", "pytorch"]
    two = ["--work-dir", tmp_path / "two", "--cfg-options", *options, "train_dataloader.batch_size=1"]
    done = subprocess.run(
        [sys.executable, *command, "--config", config, *two],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("box AP") == 1
    (scalars,) = (tmp_path / "two").glob("*/vis_data/scalars.json")  # of one process
    losses = [json.loads(line).get("loss_mimic") for line in scalars.read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None and 0 <= loss < 1]) == 2

    alone = train_net("--config", config, "--work-dir", tmp_path / "one", "--cfg-options", *options)
    assert alone.code == 0, alone.err
    weights, expected, before = (
        torch.load(tmp_path / path, map_location="cpu", weights_only=False)["state_dict"]
        for path in ("two/iter_2.pth", "one/iter_2.pth", "one/iter_1.pth")
    )
    moved = max((expected[name] - before[name]).abs().max() for name in expected)
    assert max((weights[name] - expected[name]).abs().max() for name in expected) < 1e-3 * moved
