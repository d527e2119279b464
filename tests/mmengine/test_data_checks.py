"""Data of a classifier and of a segmentor that is missing or does not fit is told before a run starts."""

import numpy as np
import pytest

pytest.importorskip("mmengine", reason="MMEngine is not installed")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from dk_detection.errors import UserError
from dk_detection.mmengine import check_data


def refused(scope, **settings) -> str:
    with DefaultScope.overwrite_default_scope(scope), pytest.raises(UserError) as error:
        check_data(Config(settings), ("train",))
    assert "\n" not in str(error.value)
    return str(error.value)


def accepted(scope, **settings) -> None:
    with DefaultScope.overwrite_default_scope(scope):
        assert check_data(Config(settings), ("train", "val")) == {}


@pytest.fixture
def pictures(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "train" / name / "1.png")
    (tmp_path / "train.txt").write_text("cat/1.png 0\ndog/1.png 1\n")
    return tmp_path


def test_classification(pictures):
    pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

    def config(num_classes=2, **dataset):
        dataset = dict(type="CustomDataset", data_root=str(pictures), data_prefix="train", pipeline=[]) | dataset
        return dict(
            scope="mmpretrain",
            train_dataloader=dict(dataset=dict(type="RepeatDataset", times=2, dataset=dataset)),
            model=dict(type="ImageClassifier", head=dict(type="LinearClsHead", num_classes=num_classes)),
        )

    where = "train_dataloader.dataset.dataset"
    accepted(**config())
    accepted(**config(ann_file="train.txt", metainfo=dict(classes=("cat", "dog"))))
    accepted(**config(3, ann_file="train.txt"))  # a file of numbers names no classes
    assert refused(**config(3)) == f"model.head.num_classes is 3, and {where} has 2 classes"
    assert refused(**config(data_root="gone")) == f"{where}: there is no folder gone"
    assert refused(**config(data_prefix="val")) == f"{where}: there is no folder {pictures}/val"
    message = f"{where}: there is no annotation file {pictures}/val.txt"
    assert refused(**config(ann_file="val.txt")) == message
    message = f"{where}: {pictures}/train has 2 folders, expected one for each of the 3 classes"
    assert refused(**config(metainfo=dict(classes=("cat", "dog", "emu")))) == message
    assert refused(**config(type="ImageNet", split="train")).endswith("expected one for each of the 1000 classes")
    message = f"{where}: the data set cannot be built (KeyError: "
    assert refused(**config(pipeline=[dict(type="NoSuchTransform")])).startswith(message)
    accepted(**config(data_root="s3://bucket"))  # elsewhere


def test_segmentation(pictures):
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

    def config(num_classes=2, seg_map_path="train/cat"):
        dataset = dict(
            type="BaseSegDataset",
            data_root=str(pictures),
            data_prefix=dict(img_path="train", seg_map_path=seg_map_path),
            metainfo=dict(classes=("cat", "dog")),
            pipeline=[],
        )
        heads = dict(decode_head=dict(type="FCNHead", num_classes=2), auxiliary_head=dict(num_classes=num_classes))
        return dict(scope="mmseg", train_dataloader=dict(dataset=dataset), model=heads)

    accepted(**config())
    assert refused(**config(3)) == "model.auxiliary_head.num_classes is 3, and train_dataloader.dataset has 2 classes"
    assert refused(**config(2, "maps")) == f"train_dataloader.dataset: there is no folder {pictures}/maps"
