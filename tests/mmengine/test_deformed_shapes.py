"""The classifier of the deformed shapes: its images, its figures, and that it trains."""

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.runner import Runner

from dk_detection.datasets.deformed_shapes import make_classification
from dk_detection.mmengine.deformed_shapes import DkAccuracyByDeformation, DkColourDistance

CONFIGS = "configs/mmpretrain/deformed_shapes"


def test_colour_distance(tmp_path):
    image = np.full((8, 8, 3), (10, 60, 200), np.uint8)
    image[2:4, 4:6] = (40, 20, 200)  # 50 away
    image[6:8, 0:2] = (10, 35, 200)  # 25 away
    cv2.imwrite(str(tmp_path / "x.png"), image)
    results = DkColourDistance(size=4)({"img_path": str(tmp_path / "x.png"), "gt_label": 3})
    expected = np.zeros((4, 4, 1))
    expected[1, 2], expected[3, 0] = 255, 127
    np.testing.assert_array_equal(results["img"], expected)
    assert results["gt_label"] == 3 and results["img_shape"] == (4, 4)
    results["img"][:] = 7  # what a pipeline does to its image
    assert DkColourDistance(size=4)({"img_path": str(tmp_path / "x.png")})["img"].max() == 255


def test_colour_distance_of_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image"):
        DkColourDistance(size=4)({"img_path": str(tmp_path / "x.png")})


def test_accuracy_by_deformation(tmp_path):
    table = tmp_path / "val.csv"
    rows = ["file,scale,rotation,shear,warp"]
    rows += [f"disc/{i}.png,{0.5 + i / 10},{-10 * i},{0.1 * (i % 2)},{0.1 - 0.01 * i}" for i in range(8)]
    table.write_text("\n".join(rows))
    metric = DkAccuracyByDeformation(table=str(table))
    for i in range(8):  # those of 0 to 2 are right
        scores = torch.tensor([0.9, 0.1]) if i < 3 else torch.tensor([0.1, 0.9])
        sample = {"img_path": f"/data/val/disc/{i}.png", "gt_label": torch.tensor([0]), "pred_score": scores}
        metric.process(None, [sample])
    figures = metric.evaluate(size=8)
    assert figures["accuracy"] == 37.5
    assert [figures[f"accuracy_scale_{q}"] for q in (1, 2, 3, 4)] == [100, 50, 0, 0]
    assert [figures[f"accuracy_rotation_{q}"] for q in (1, 2, 3, 4)] == [100, 50, 0, 0]  # by size, not by sign
    assert [figures[f"accuracy_warp_{q}"] for q in (1, 2, 3, 4)] == [0, 0, 50, 100]
    assert figures["accuracy_shear_1"] == 100  # images 0 and 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_classification(root, num_train=12, num_val=8, image_size=32)
    return root


@pytest.mark.parametrize(
    ("row", "figures"),
    [
        ("", set()),
        ("-gdk", {"kernel_offset", "kernel_offset_varying", "clipped", "scope_used"}),
        ("-dk-s5-paper", {"kernel_offset", "kernel_offset_varying", "clipped", "scope_used"}),
        ("-mdconv", {"offset", "offset_varying", "modulation", "modulation_varying"}),
        ("-scc", set()),
    ],
)
def test_config_trains(data, tmp_path, monkeypatch, row, figures):
    monkeypatch.setenv("DK_DEFORMED_SHAPES_CLS_ROOT", str(data))
    cfg = Config.fromfile(f"{CONFIGS}/regnet-dw{row}_2e_deformed-shapes.py")
    cfg.merge_from_dict(
        {"work_dir": str(tmp_path), "train_dataloader.batch_size": 6, "train_cfg.max_epochs": 1, "log_level": "ERROR"}
    )
    cfg.train_cfg.val_interval = 1
    runner = Runner.from_cfg(cfg)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.train()
    found = runner.message_hub.log_scalars
    assert {name.removeprefix("val/sampling/") for name in found if "sampling" in name} == figures
    assert 0 <= found["val/accuracy"].current() <= 100
    moved = [name for name, value in runner.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("layer3.1.conv2" in name for name in moved)
    if figures:
        assert any("offset" in name for name in moved)


def test_offset_branches_have_an_absolute_rate():
    """0.001 under SGD, whatever the network's own rate: docs/study.md."""
    cfg = Config.fromfile(f"{CONFIGS}/regnet-dw_2e_deformed-shapes.py")
    rate = cfg.optim_wrapper.optimizer.lr
    for branch in ("conv_offset", "kernel_offset"):
        assert rate * cfg.optim_wrapper.paramwise_cfg.custom_keys[branch].lr_mult == pytest.approx(0.001)
