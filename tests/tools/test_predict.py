"""tools/predict.py in both frameworks: pictures, a data set that pycocotools reads, and what it says of bad input."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from dk_detection.datasets import deformed_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "deformed_shapes/mask-rcnn_r18_fpn_1k_deformed-shapes.py"
# So that a detector of random weights finds something.
OPTIONS = {
    "mmdet": ["model.test_cfg.rcnn.score_thr=0.0", "model.test_cfg.rcnn.max_per_img=4"],
    "detectron2": [
        f"model.roi_heads.box_predictor.{key}" for key in ("test_score_thresh=0.0", "test_topk_per_image=4")
    ],
}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("predict", ROOT / "tools" / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    deformed_shapes.make(root, num_train=1, num_val=2, num_test=1)
    (root / "val" / "note.txt").write_text("not a picture")
    return root


@pytest.mark.parametrize("framework", ["mmdet", "detectron2"])
def test_pictures_of_a_folder(tool, data, framework, tmp_path, monkeypatch, capsys):
    pytest.importorskip(framework)
    monkeypatch.setenv("DK_DEFORMED_SHAPES_ROOT", str(data))
    module = importlib.import_module(f"dk_detection.{framework}.visualize")
    config, checkpoint = ROOT / "configs" / framework / CONFIG, tmp_path / "random.pth"
    network = module.load_detector(str(config)).network
    key = "state_dict" if framework == "mmdet" else "model"
    torch.save({key: network.state_dict(), "meta": {"dataset_meta": {"classes": list("abcdef")}}}, checkpoint)
    arguments = ["--config", config, "--checkpoint", checkpoint, "--images", data / "val", "--out", tmp_path / "out"]

    arguments = [*map(str, arguments), "--score", "0", "--cfg-options", *OPTIONS[framework]]
    assert tool.main(arguments) == 0, capsys.readouterr().err
    found = COCO(tmp_path / "out" / "predictions.json")
    names = sorted(path.name for path in (data / "val").glob("*.png"))
    assert [image["file_name"] for image in found.imgs.values()] == names
    assert len(found.anns) == 4 * len(names) > 0
    if framework == "mmdet":  # the checkpoint tells
        assert [category["name"] for category in found.cats.values()] == list("abcdef")
    assert {annotation["category_id"] for annotation in found.anns.values()} <= found.cats.keys()
    for annotation in found.anns.values():
        assert found.annToMask(annotation).sum() == annotation["area"]
    for name in names:
        before, after = (cv2.imread(str(folder / name)) for folder in (data / "val", tmp_path / "out" / "vis"))
        assert before.shape == after.shape and np.any(before != after)

    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments[arguments.index("--images") + 1] = str(tmp_path / "broken.png")
    assert tool.main(arguments) == 1
    assert "broken.png: the image cannot be read" in capsys.readouterr().err


def test_a_folder_without_pictures(tool, tmp_path, capsys):
    assert tool.main(["--config", "x.py", "--checkpoint", "x.pth", "--images", str(tmp_path)]) == 1
    assert "holds no picture" in capsys.readouterr().err
