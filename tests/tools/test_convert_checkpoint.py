"""The command line that converts checkpoints, there and back, and what it says about wrong ones."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def convert(*argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True, timeout=120, check=False
    )


def test_there_and_back(tmp_path):
    weights = {"rpn_head.rpn_cls.bias": torch.arange(6.0), "backbone.bn1.num_batches_tracked": torch.tensor(3)}
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "mmdet.pth")
    for source, target in (("mmdet", "detectron2"), ("detectron2", "back")):
        done = convert(tmp_path / f"{source}.pth", tmp_path / f"{target}.pth")
        assert (done.returncode, done.stderr) == (0, "")
    there = torch.load(tmp_path / "detectron2.pth")
    assert list(there) == ["model"]
    assert there["model"]["proposal_generator.rpn_head.objectness_logits.bias"].tolist() == [0, 2, 4, 1, 3, 5]
    back = torch.load(tmp_path / "back.pth")["state_dict"]
    assert {name: value.tolist() for name, value in back.items()} == {"rpn_head.rpn_cls.bias": list(range(6))}


def test_pickle_of_detectron2(tmp_path):
    name = "roi_heads.box_predictor.cls_score.bias"
    with open(tmp_path / "zoo.pkl", "wb") as file:
        pickle.dump({"model": {name: np.ones(4, np.float32)}, "__author__": "x"}, file)
    assert convert(tmp_path / "zoo.pkl", tmp_path / "mmdet.pth").returncode == 0
    state = torch.load(tmp_path / "mmdet.pth")["state_dict"]
    assert state["roi_head.bbox_head.fc_cls.bias"].equal(torch.ones(4))


@pytest.mark.parametrize(
    ("content", "argv", "message"),
    [
        (None, (), "the checkpoint cannot be read (FileNotFoundError"),
        ([1, 2], (), "the checkpoint cannot be read (AttributeError"),
        ({"words": "x"}, (), "the checkpoint cannot be read (TypeError"),
        ({"neck.lateral_convs.0.conv.bias": torch.zeros(1)}, (), "the checkpoint cannot be written ("),
        ({}, ("--num-ratios", 0), "--num-ratios must be at least 1, got 0"),
    ],
)
def test_wrong_files_and_arguments(tmp_path, content, argv, message):
    if content is not None:
        torch.save(content, tmp_path / "from.pth")
    done = convert(tmp_path / "from.pth", tmp_path / "no_such_folder" / "to.pth", *argv)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert message in done.stderr
