"""The hook that shows what a network in training looks at, and the contact sheet."""

import json

import cv2
import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.config import Config
from mmengine.runner import Runner

from dk_detection.datasets import deformed_shapes
from tests.tools.command_line import ROOT

CONFIG = ROOT / "configs/mmdet/deformed_shapes/mask-rcnn_r18-dkmdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of three iterations with the hook."""
    root, work_dir = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    deformed_shapes.make(root / "shapes", num_train=4, num_val=3, num_test=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DK_DEFORMED_SHAPES_ROOT", str(root / "shapes"))
        cfg = Config.fromfile(CONFIG)
    loader = dict(num_workers=0, persistent_workers=False)
    cfg.merge_from_dict(
        dict(
            work_dir=str(work_dir),
            train_cfg=dict(max_iters=3, val_interval=3),
            train_dataloader=dict(batch_size=1, **loader),
            val_dataloader=loader,
            visualizer=dict(  # under a name of its own, as MMEngine keeps one of each name for all runs of a process
                name="with_tensorboard",
                vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
            ),
            default_hooks=dict(logger=dict(interval=1)),
        )
    )
    cfg.custom_hooks += [dict(type="DkVisualizeHook", interval=2, layer="backbone.layer3.1.conv2", levels=1)]
    Runner.from_cfg(cfg).train()
    return work_dir


def test_pictures_and_norms_go_to_every_backend_of_the_visualizer(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (picture,) = trained.glob("*/vis_data/vis_image/dk_sampling_2.png")
    assert cv2.imread(str(picture)).std() > 10
    (scalars,) = trained.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    norms = next(line for line in lines if "offset_norm/backbone.layer2.0.conv1" in line)
    assert norms["step"] == 2
    # One step of AdamW has moved what started at zero.
    assert norms["offset_norm/backbone.layer2.0.conv1"] > 0
    assert norms["offset_norm/backbone.layer2.0.conv1/kernel"] > 0
    assert any(name.startswith("offset_norm/roi_head.bbox_roi_extractor") for name in norms)
    logged = [line["offset_norm"] for line in lines if "offset_norm" in line]
    assert max(value for name, value in norms.items() if "/" in name) == pytest.approx(logged[0])
    (events,) = trained.glob("*/vis_data/events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    assert "dk_sampling" in board.Tags()["images"]
    assert "offset_norm/backbone.layer4.1.conv2" in board.Tags()["scalars"]


def test_the_contact_sheet_has_three_objects(trained):
    sheet = cv2.imread(str(trained / "contact_sheet.png"))
    height, width = sheet.shape[:2]
    assert 0.7 < height / width < 0.95  # three rows, four columns of square images
    for row in range(3):
        assert sheet[row * height // 3 : (row + 1) * height // 3].std() > 20
