"""The command line with configs of Detectron2, from the outside."""

import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from dk_detection.datasets import deformed_shapes
from tests.tools.command_line import ROOT, SCRIPT, Done, plain, refused, running, without

CONFIG = ROOT / "configs" / "detectron2" / "deformed_shapes" / "mask-rcnn_r18-mdconv-c3-c5_fpn_1k_deformed-shapes.py"

# The small config, made tiny: 4 iterations of 2 images, a checkpoint every second.
TINY_LAZY = """
from detectron2.config import LazyConfig

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load_rel(
    "{base}", ("dataloader", "lr_multiplier", "model", "optimizer", "train"))
train.update(max_iter=4, eval_period=4, log_period=1)
train.checkpointer.period = 2
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.test.num_workers = 0
model.network.roi_heads.box_predictor.test_score_thresh = 0.0
tta = dict(enabled=False, min_sizes=[96, 128], max_size=128, flip=True)
"""

TINY_YAML = """
_BASE_: {base}
MODEL:
  WEIGHTS: ""
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8, NORM: BN}}
  BACKBONE: {{FREEZE_AT: 0}}
  FPN: {{OUT_CHANNELS: 16}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TRAIN: 20, PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TEST: 20}}
  ROI_HEADS: {{NUM_CLASSES: 6, BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}}
  ROI_BOX_HEAD: {{FC_DIM: 16}}
  ROI_MASK_HEAD: {{NUM_CONV: 1, CONV_DIM: 16}}
DATASETS:
  TRAIN: ("deformed_shapes_train",)
  TEST: ("deformed_shapes_val",)
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 2, STEPS: [], CHECKPOINT_PERIOD: 2}}
TEST: {{EVAL_PERIOD: 2, AUG: {{ENABLED: True, MIN_SIZES: [96], MAX_SIZE: 128}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data and configs."""
    folder = tmp_path_factory.mktemp("detectron2")
    deformed_shapes.make(folder / "shapes", num_train=4, num_val=3, num_test=1)
    (folder / "tiny.py").write_text(TINY_LAZY.format(base=os.path.relpath(CONFIG, folder)), encoding="utf-8")
    base = ROOT / "configs" / "detectron2" / "dcnv2" / "mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.yaml"
    (folder / "tiny.yaml").write_text(TINY_YAML.format(base=base), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def environment(folder) -> dict:
    return {
        "DK_DEFORMED_SHAPES_ROOT": str(folder / "shapes"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="module")
def train_net(environment, tmp_path_factory):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    with running(environment, tmp_path_factory.mktemp("run"), "dk_detection.detectron2.train") as run:
        yield run


def iterations(run: Path) -> list[int]:
    """The iterations that the log of a run has losses of."""
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return [line["iteration"] for line in lines if "total_loss" in line]


# Arguments. These fail before a framework is loaded, or because it is not there.


@pytest.mark.parametrize("form", ["--config", "--config-file", None])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rcnn.yaml", '_BASE_: "../Base-RCNN-FPN.yaml"\nMODEL:\n  MASK_ON: False\n'),
        ("rcnn.py", "from ..common.coco_loader import dataloader\nfrom detectron2.config import LazyCall as L\n"),
    ],
)
def test_detectron2_is_not_installed(tmp_path, form, name, text):
    path = tmp_path / name
    path.write_text(text)
    argv = [*([form] if form else []), path, "--resume", "--num-gpus", "2"]
    message = refused(plain(*argv, env=without("detectron2", tmp_path)))
    assert message.startswith(f"{path} is a config of Detectron2. dk_detection.detectron2 needs Detectron2")
    assert "tutorials/install.html" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--work-dir", "x"],
            "--work-dir is no option of Detectron2, which {} is for: write OUTPUT_DIR DIR (YAML)",
        ),
        (["--amp"], "--amp is no option of Detectron2"),
        (["--eval-only", "--checkpoint", "a.pth"], "--checkpoint is no option of Detectron2"),
        (["--cfg-options", "a=1"], "--cfg-options is no option of Detectron2"),
        (["--launcher", "pytorch"], "--launcher is no option of Detectron2"),
        (["--no-such"], "unrecognized arguments: --no-such (--help lists the options)"),
        (["--cfg-options", "a=1", "{}"], "--cfg-options is no option of Detectron2"),
        (["--num-machines", "2"], "--num-machines needs --dist-url, the address of the first machine"),
    ],
)
@pytest.mark.parametrize("name", ["tiny.py", "tiny.yaml"])
def test_arguments(folder, name, argv, message):
    path = folder / name
    option = () if "{}" in argv else ("--config", path)
    argv = [path if argument == "{}" else argument for argument in argv]
    assert refused(plain(*option, *argv)).startswith(message.format(path))


def test_no_config():
    assert refused(plain("--framework", "detectron2", "gone.yaml")) == "gone.yaml: there is no such config file"


def test_config_of_the_other_framework(train_net):
    config = next((ROOT / "configs" / "mmdet").rglob("faster-rcnn_r50_fpn_1x_coco.py"))
    message = refused(train_net("--config", config, "--framework", "detectron2"))
    assert message.startswith(f"{config}: the config sets no model")


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("tiny.yaml", ["SOLVER.LR", "1"], "SOLVER.LR 1: expected KEY VALUE ... (AssertionError: Non-existent"),
        ("tiny.py", ["train.max_iter"], "train.max_iter: expected key=value"),
        ("tiny.yaml", ["MODEL.WEIGHTS", "gone.pth"], "gone.pth: there is no such checkpoint"),
        ("tiny.py", ["train.init_checkpoint=gone.pth"], "gone.pth: there is no such checkpoint"),
        ("tiny.yaml", ["MODEL.WEIGHTS", "gone.pth?matching_heuristics=True"], "gone.pth?matching_heuristics=True: "),
        ("tiny.yaml", ["SOLVER.AMP.ENABLED", "True"], "{}: Detectron2 trains with mixed precision on a GPU only"),
        ("tiny.py", ["train.amp.enabled=True"], "{}: Detectron2 trains with mixed precision on a GPU only"),
        (
            "tiny.py",
            ["--eval-only"],
            "--eval-only: name a checkpoint with train.init_checkpoint=CKPT, or write ",
        ),
        ("tiny.yaml", ["--eval-only"], "--eval-only: name a checkpoint with MODEL.WEIGHTS CKPT, or write --resume"),
        ("tiny.yaml", ["--num-gpus", "2"], "{}: Detectron2 trains a YAML config in several processes on GPUs only"),
        ("tiny.yaml", ["DATASETS.TEST", "('no_such',)"], "no data set is registered as 'no_such'"),
        (
            "tiny.yaml",
            ["DATASETS.TEST", "('cityscapes_fine_instance_seg_val',)"],
            "cityscapes_fine_instance_seg_val: only data sets like COCO and PASCAL VOC can be evaluated here",
        ),
        (
            "tiny.yaml",
            ["DATASETS.TRAIN", "('coco_2017_train',)"],
            "coco_2017_train: there is no annotation file ",
        ),
    ],
)
def test_settings(train_net, folder, name, opts, message):
    assert refused(train_net("--config", folder / name, *opts)).startswith(message.format(folder / name))


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("tiny.py", "train.max_iters=3", "there is no setting train.max_iters; did you mean train.max_iter?"),
        ("tiny.py", "optimizer.weight_decy=1", "did you mean optimizer.weight_decay?"),
        ("tiny.py", "optimizer.nestrov=1", "there is no setting optimizer.nestrov"),
        ("tiny.py", "dataloader.train.total_batchsize=3", "did you mean dataloader.train.total_batch_size?"),
        ("tiny.py", "model.network.roi_heads.num_clases=6", "did you mean model.network.roi_heads.num_classes?"),
        ("tiny.py", "dataloader.train.mapper.augmentations.7.prob=1", "augmentations has 3 elements, 0 to 2"),
        ("tiny.py", "trian.max_iter=3", "trian is no setting; did you mean train?"),
        ("tiny.py", "image_size=3", "image_size is no setting"),
        ("tiny.py", "train.max_iter.x=3", "train.max_iter is 4 and has no x; set it as a whole"),
        ("tiny.py", "train.device=null", "{}: the config sets no train.device"),
        ("tiny.py", "train.output_dir=null", "{}: the config sets no train.output_dir"),
        ("tiny.py", "train.max_iter=many", "{}: train.max_iter is 'many', expected int"),
        ("tiny.py", "train.amp=null", "{}: the config sets no train.amp"),
        ("tiny.py", "train.device=gpu", "{}: 'gpu' is no device"),
        ("tiny.yaml", "MODEL.DEVICE gpu", "{}: 'gpu' is no device"),
        ("tiny.yaml", "SOLVER.LR 1", "did you mean SOLVER.BASE_LR?"),
        ("tiny.yaml", "MODEL.ROI_HEAD.NUM_CLASSES 3", "did you mean MODEL.ROI_HEADS.NUM_CLASSES?"),
        ("tiny.py", "tta.min_size=[96]", "did you mean tta.min_sizes?"),
        (
            "tiny.py",
            "+tta.views=3",
            "there is no setting tta.views; there are box_averaging, enabled, flip, max_size, ",
        ),
        (
            "tiny.yaml",
            "MODEL.META_ARCHITECTURE GeneralizedRCNN",
            "{}: MODEL.DK.EXCHANGE has no effect, since MODEL.META_ARCHITECTURE is 'GeneralizedRCNN', expected DkDefor",
        ),
        (
            "tiny.yaml",
            "MODEL.META_ARCHITECTURE RetinaNet MODEL.DK.EXCHANGE [] MODEL.DK.NETWORK DkMimicRCNN",
            "MODEL.DK.NETWORK has no effect",
        ),
        (
            "tiny.yaml",
            "MODEL.DK.REDUCED_CHANNELS 128",
            "MODEL.DK.REDUCED_CHANNELS has no effect, since MODEL.BACKBONE.N",
        ),
        (
            "tiny.yaml",
            "MODEL.DK.BACKBONE mobilenet-v2",
            "MODEL.DK.BACKBONE has no effect, since MODEL.BACKBONE.NAME is",
        ),
        ("tiny.yaml", "MODEL.DK.NORM_EVAL False", "MODEL.DK.NORM_EVAL has no effect"),
        (
            "tiny.yaml",
            "MODEL.DK.BOX_POOLER.GAMMA 0.2",
            "MODEL.DK.BOX_POOLER has no effect, since MODEL.ROI_BOX_HEAD.POOLER_TYPE is 'ROIAlignV2', expected DkDefor",
        ),
        ("tiny.yaml", "MODEL.DK.MASK_POOLER.BRANCH_SIZE 7", "MODEL.DK.MASK_POOLER has no effect"),
        ("tiny.yaml", "MODEL.DK.MIMIC.REGIONS both", "MODEL.DK.MIMIC has no effect"),
        (
            "tiny.yaml",
            "MODEL.ROI_HEADS.NUM_CLASSES 80",
            "MODEL.ROI_HEADS.NUM_CLASSES is 80, and deformed_shapes_train",
        ),
        (
            "tiny.py",
            "model.network.roi_heads.num_classes=3",
            "model.network.roi_heads.num_classes is 3, and deformed_sh",
        ),
    ],
)
def test_setting_without_an_effect_or_of_the_wrong_kind(load, folder, name, opts, message):
    from dk_detection.errors import UserError

    with pytest.raises(UserError) as error:
        load(name, opts)
    assert message.format(folder / name) in str(error.value)


@pytest.fixture
def load(folder, monkeypatch):
    """A function that does all that comes before a run."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dk_detection.detectron2.train import _load

    monkeypatch.setattr("dk_detection.detectron2.train.check_data", partial(check_shapes, folder / "shapes"))

    def load(name, opts, resume=False):
        return _load(Namespace(config_file=str(folder / name), opts=opts.split(), eval_only=False, resume=resume))

    return load


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("tiny.yaml", "MODEL.META_ARCHITECTURE GeneralizedRCNN MODEL.DK.EXCHANGE []"),
        ("tiny.yaml", "MODEL.DK.NETWORK DkMimicRCNN MODEL.DK.MIMIC.REGIONS both"),
        (
            "tiny.yaml",
            "MODEL.ROI_HEADS.NAME DkROIHeads MODEL.ROI_BOX_HEAD.POOLER_TYPE DkDeformRoIPool "
            "MODEL.DK.BOX_POOLER.GAMMA 0.2 MODEL.MASK_ON False",
        ),
        (
            "tiny.yaml",
            "MODEL.BACKBONE.NAME build_dk_fpn_backbone MODEL.DK.BACKBONE mobilenet-v2 MODEL.DK.NORM_EVAL False",
        ),
        ("tiny.yaml", "MODEL.BACKBONE.NAME build_dk_reduced_resnet_backbone MODEL.DK.REDUCED_CHANNELS 128"),
        ("tiny.py", "+tta.box_averaging.iterations=2"),
    ],
)
def test_setting_with_an_effect(load, name, opts):
    load(name, opts)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("tiny.yaml", "MODEL.DK.NETWORK FasterRCNN", "{}: the model cannot be built (KeyError: "),
        (
            "tiny.yaml",
            "MODEL.DK.EXCHANGE [{'layer':'mdconv'}]",
            "{}: the model cannot be built (ValueError: exch",
        ),
        ("tiny.yaml", "MODEL.RESNETS.DEPTH 51", "{}: the model cannot be built (KeyError: 51)"),
        ("tiny.py", "model.exchange.0.layer=dcn", "{}: the model cannot be built (ValueError: no layer has the token"),
        (
            "tiny.py",
            "model.exchange.0.select=no*",
            "{}: the model cannot be built (ValueError: to_deformab",
        ),
    ],
)
def test_model_that_cannot_be_built(folder, name, option, message):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dk_detection.detectron2.jobs import load_job
    from dk_detection.detectron2.train import Trainer
    from dk_detection.errors import UserError

    job = load_job(str(folder / name), option.split())
    with pytest.raises(UserError) as error:
        job.build_model("cpu")
    assert str(error.value).startswith(message.format(folder / name))
    if name == "tiny.yaml":
        with pytest.raises(UserError, match=r"^the model of the config cannot be built"):
            Trainer.build_model(job.cfg)


# The settings of the run, those it is resumed with, and what is said: of another run, in a line each, or nothing.
RESUMED = [
    ("tiny.py", "", "model.network.roi_heads.num_classes=6 train.eval_period=7 train.checkpointer.period=3", None),
    ("tiny.py", "", "dataloader.train.num_workers=2 model.network.roi_heads.box_predictor.test_score_thresh=0.3", None),
    (
        "tiny.py",
        "",
        "dataloader.train.total_batch_size=1",
        "goes on with another dataloader.train.total_batch_size (2 th",
    ),
    ("tiny.py", "", "train.max_iter=9", "goes on with another train.max_iter (4 there, 9 here)"),
    ("tiny.py", "", "lr_multiplier.warmup_factor=0.5", "goes on with another lr_multiplier.warmup_factor"),
    ("tiny.py", "", "model.network.roi_heads.batch_size_per_image=9", "!model.network.roi_heads.batch_size_per_image"),
    ("tiny.py", "", "model.exchange=[]", "!model.exchange"),
    ("tiny.py", "", "dataloader.train.dataset.names=deformed_shapes_val", "!dataloader.train.dataset.names (deformed_"),
    (
        "tiny.py",
        "",
        "dataloader.train.mapper.augmentations.0.max_size=96",
        "!dataloader.train.mapper.augmentations[0].m",
    ),
    ("tiny.py", "", "dataloader.train.mapper.use_instance_mask=False", "!dataloader.train.mapper.use_instance_mask"),
    (
        "tiny.yaml",
        "",
        "TEST.EVAL_PERIOD 9 SOLVER.CHECKPOINT_PERIOD 9 DATALOADER.NUM_WORKERS 1 INPUT.MIN_SIZE_TEST 64",
        None,
    ),
    ("tiny.yaml", "", "SOLVER.IMS_PER_BATCH 1", "the run goes on with another SOLVER.IMS_PER_BATCH (2 there, 1 here)"),
    ("tiny.yaml", "SOLVER.STEPS (1,)", "", "the run goes on with another SOLVER.STEPS ([1] there, [] here)"),
    ("tiny.yaml", "", "MODEL.RESNETS.STRIDE_IN_1X1 True", "!MODEL.RESNETS.STRIDE_IN_1X1 (False there, True here)"),
    ("tiny.yaml", "", "MODEL.PIXEL_MEAN [1.0,2.0,3.0]", "!MODEL.PIXEL_MEAN[0] (123.675 there, 1.0 here)"),
    ("tiny.yaml", "", "MODEL.DK.EXCHANGE []", "!MODEL.DK.EXCHANGE"),
    ("tiny.yaml", "INPUT.RANDOM_FLIP none", "", "!INPUT.RANDOM_FLIP (none there, horizontal here)"),
    ("tiny.yaml", "DATASETS.TRAIN ('deformed_shapes_val',)", "", "!DATASETS.TRAIN[0] (deformed_shapes_val there, def"),
]


@pytest.mark.parametrize(("name", "before", "now", "message"), RESUMED)
def test_resume_with_other_settings(load, folder, tmp_path, capsys, name, before, now, message):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dk_detection.detectron2.jobs import load_job
    from dk_detection.errors import UserError

    settings = load_job(str(folder / name), before.split()).settings()
    torch.save({"model": {}, "settings": settings}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    now += f" OUTPUT_DIR {tmp_path}" if name.endswith("yaml") else f" train.output_dir={tmp_path}"
    if message and message.startswith("!"):
        with pytest.raises(UserError) as error:
            load(name, now, resume=True)
        assert "it belongs to the run of another config; they differ in " in str(error.value)
        assert message[1:] in str(error.value)
        return
    load(name, now, resume=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "goes on" in line]
    assert len(lines) == (message is not None)
    assert message is None or message in lines[0]


def check_shapes(root: Path, **settings) -> dict:
    """The check of data, with the data set of this file, whatever was registered before."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from dk_detection.detectron2 import data

    for split in ("train", "val"):
        DatasetCatalog.pop(f"deformed_shapes_{split}", None)
        MetadataCatalog.pop(f"deformed_shapes_{split}", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DK_DEFORMED_SHAPES_ROOT", str(root))
        data.register()
    return data.check_data(**settings)


# Runs.


@pytest.fixture(scope="module")
def trained(train_net, folder, tmp_path_factory) -> tuple[Path, Done]:
    run = tmp_path_factory.mktemp("trained") / "run"
    done = train_net("--config", folder / "tiny.py", f"train.output_dir={run}")
    assert done.code == 0, done.err
    return run, done


def test_training(trained):
    run, done = trained
    assert iterations(run) == [0, 1, 2, 3]
    assert re.search(r"^box AP \d+\.\d, mask AP \d+\.\d \(COCO metric, 0 to 100\)$", done.out, re.MULTILINE)
    assert done.out.endswith(f"Everything is in {run}\n")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert {"model_0000001.pth", "model_final.pth", "config.yaml", "inference/coco_instances_results.json"} <= names


def test_resume_and_evaluation(train_net, folder, trained, tmp_path):
    run, _ = trained
    half = tmp_path / "half"
    half.mkdir()
    (half / "model_0000001.pth").write_bytes((run / "model_0000001.pth").read_bytes())
    (half / "last_checkpoint").write_text("model_0000001.pth")
    again = train_net("--config", folder / "tiny.py", "--resume", f"train.output_dir={half}")
    assert again.code == 0, again.err
    assert iterations(half) == [2, 3]

    figures = re.search("^box AP .*$", again.out, re.MULTILINE)[0]
    for argv in (
        ["--eval-only", "--resume", f"train.output_dir={half}", "tta.enabled=True"],
        ["--eval-only", f"train.init_checkpoint={half / 'model_final.pth'}", f"train.output_dir={tmp_path / 'new'}"],
    ):
        evaluated = train_net("--config", folder / "tiny.py", *argv)
        assert evaluated.code == 0, evaluated.err
        figures_now = re.search("^box AP .*$", evaluated.out, re.MULTILINE)[0]
        assert figures_now.startswith(figures.removesuffix(" (COCO metric, 0 to 100)"))
        assert ("with augmentation" in figures_now) == ("tta.enabled=True" in argv)
    assert (half / "inference_TTA" / "coco_instances_results.json").is_file()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny.py", "train.dk_visualize.period=2 train.max_iter=2 train.eval_period=0 train.output_dir={}"),
        ("tiny.yaml", "DK_VISUALIZE.PERIOD 2 TEST.EVAL_PERIOD 0 TEST.AUG.ENABLED False OUTPUT_DIR {}"),
    ],
)
def test_pictures_of_what_a_detector_looks_at(train_net, folder, tmp_path, name, options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train_net("--config", folder / name, *options.format(tmp_path / "run").split())
    assert done.code == 0, done.err
    (events,) = (tmp_path / "run").glob("events.*")
    seen = EventAccumulator(str(events)).Reload().Tags()
    assert "dk_sampling" in seen["images"]
    assert any(tag.startswith("offset_norm/") for tag in seen["scalars"])


def test_resume_with_another_learning_rate(train_net, folder, trained):
    """Detectron2 would go on with that of the checkpoint."""
    run, _ = trained
    argv = ("--config", folder / "tiny.py", "--resume", f"train.output_dir={run}", "train.max_iter=6")
    for option, difference in (
        ("optimizer.lr=0.5", "learning rate 0.001 there, 0.5 in the config"),
        ("optimizer.weight_decay=0.5", "weight_decay 0.05 there, 0.5 in the config"),
    ):
        done = train_net(*argv, option)
        assert done.code == 1
        assert f"--resume goes on with the optimiser of the checkpoint: {difference}" in done.err.splitlines()[-1]
    assert "belongs to the run of another config" in refused(train_net(*argv, "model.exchange=[]"))
    last = train_net(*argv, "optimizer.lr=null").err.splitlines()[-1]
    assert last.startswith(f"train_net.py: {folder / 'tiny.py'}: the optimizer cannot be built (ValueError")


def test_yaml(train_net, folder, tmp_path):
    run = tmp_path / "run"
    common = ("--config", folder / "tiny.yaml")
    done = train_net(*common, "OUTPUT_DIR", run)
    assert done.code == 0, done.err
    assert re.search(r"^box AP .*, mask AP .*, box AP with augmentation .*, mask AP with augmentation ", done.out, re.M)
    assert (run / "inference_TTA" / "coco_instances_results.json").is_file()
    groups = torch.load(run / "model_final.pth")["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert sorted({group["initial_lr"] for group in groups}) == pytest.approx([0.002, 0.02])

    done = train_net(*common, "--resume", "OUTPUT_DIR", run, "SOLVER.MAX_ITER", "3", "TEST.AUG.ENABLED", "False")
    assert done.code == 0, done.err
    assert iterations(run) == [1, 2]  # Detectron2 logs the last iteration of a run

    weights = f"{run / 'model_final.pth'}?matching_heuristics=True"
    done = train_net(*common, "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "new")
    assert done.code == 0, done.err
    assert "Everything is in" in done.out


def test_stopped_from_outside(train_net, folder, tmp_path):
    run = tmp_path / "run"
    options = ("train.max_iter=500", "train.checkpointer.period=1", "dataloader.train.num_workers=1")
    argv = ("--config", folder / "tiny.py", f"train.output_dir={run}", *options)
    done = train_net(*argv, signal=signal.SIGTERM, when=run / "last_checkpoint")
    assert done.code == 143
    assert not done.left
    assert done.err.splitlines()[-1] == "train_net.py: interrupted; the same command with --resume continues"


def test_error_in_one_of_several_processes(environment, folder):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    argv = ["--eval-only", "--num-gpus", "2", "train.init_checkpoint=https://localhost:1/x.pkl"]
    done = plain("--config", folder / "tiny.py", *argv, env={**os.environ, **environment}, cwd=folder)
    assert done.code == 1
    assert ": the weights could not be downloaded (" in done.err.splitlines()[-1]


def test_runs_of_one_process_have_logs_of_their_own(tmp_path):
    """tools/compare.py makes them."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.utils.logger import setup_logger

    from dk_detection.detectron2.train import _end_log

    for run in ("first", "second"):
        setup_logger(str(tmp_path / run)).info(f"the {run}")
        _end_log()
    for run in ("first", "second"):
        (line,) = (tmp_path / run / "log.txt").read_text().splitlines()
        assert line.endswith(f"the {run}")


def test_figures_of_several_data_sets(capsys):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dk_detection.detectron2.train import _summarise

    _summarise({"bbox/AP": float("nan"), "segm/AP": 0.0}, "here")
    assert capsys.readouterr().out.startswith("box AP undefined, mask AP 0.0 (COCO metric, 0 to 100)\n")
    _summarise({"a/bbox/AP": 31.25, "a/bbox/AP50": 40.0, "b/segm/AP": 20.0, "bbox_TTA/AP": 50.0}, "here")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "a box AP 31.2, b mask AP 20.0, box AP with augmentation 50.0 (COCO metric, 0 to 100)"


def test_learning_rate_factor_of_nothing(capsys):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dk_detection.detectron2.train import _say_unused

    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    _say_unused({"weight": 0.1, "wieght": 0.1, "bias": 0.1, "conv_offset": 0.1}, model)
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"learning-rate factor of {part!r}: no parameter that learns has this in its name"
        for part in ("bias", "wieght")
    ]


def test_torchrun(environment, folder, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    options = ["train.max_iter=1"]
    done = subprocess.run(
        [sys.executable, *command, "--config", folder / "tiny.py", *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Everything is in work_dirs/tiny\n") == 1  # the folder is named after the config
    assert "World size: 2" in done.stdout
    assert iterations(tmp_path / "work_dirs" / "tiny") == [0]
