"""The configs for PASCAL VOC on a miniature of its folders."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from dk_detection.errors import UserError
from dk_detection.mmdet.data_checks import check_data
from tests import voc

CONFIG = Path(__file__).parents[2] / "configs/mmdet/dcnv1/class-aware-rpn_r101_dc5_30k_voc0712.py"


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setenv("DK_VOC_ROOT", str(voc.make(tmp_path / "voc")))
    cfg = Config.fromfile(CONFIG)
    for mode in ("train", "val"):
        cfg[f"{mode}_dataloader"].update(num_workers=0, persistent_workers=False)
    return cfg


def test_batches(cfg):
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    assert len(loader) == 4  # of both years
    found = [sample for batch in loader for sample in batch["data_samples"]]
    for sample in found:
        assert len(sample.gt_instances) == 10 and len(sample.ignored_instances) == 0
        assert sample.img_shape == (600, 900)
    assert {int(label) for sample in found for label in sample.gt_instances.labels} == set(range(20))


def test_evaluator(cfg):
    """The boxes themselves, moved by a part of their width: an IoU of about 0.6, above one threshold and below the
    other."""
    loader = Runner.build_dataloader(cfg.val_dataloader)
    metric = METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        for sample in batch["data_samples"]:
            truth = sample.gt_instances
            boxes = getattr(truth.bboxes, "tensor", truth.bboxes)
            boxes = boxes + torch.tensor([3.0, 0, 3, 0]) * (truth.labels[:, None] < 5)
            sample.pred_instances = InstanceData(bboxes=boxes, labels=truth.labels, scores=torch.ones(len(boxes)))
        metric.process(batch, [sample.to_dict() for sample in batch["data_samples"]])
    figures = metric.evaluate(size=2)
    assert figures["pascal_voc/AP50"] == pytest.approx(1)
    assert figures["pascal_voc/AP70"] == pytest.approx(15 / 20)


def test_check_of_data(cfg, tmp_path, capsys):
    assert check_data(cfg, ("train", "val")) == {}
    assert capsys.readouterr().out.count("2 pictures; 20 of 20 objects of 2 of them are of the classes") == 3
    cfg.model.bbox_head.num_classes = 21
    with pytest.raises(UserError, match=r"model\.bbox_head\.num_classes is 21, and .*datasets\[0\] has 20 classes"):
        check_data(cfg, ("train",))
    (tmp_path / "voc/VOC2012/JPEGImages/2012_trainval_0.jpg").unlink()
    cfg.model.bbox_head.num_classes = 20
    with pytest.raises(UserError, match=r"datasets\[1\]: .*2012_trainval_0\.jpg; set DK_VOC_ROOT to the folder of the"):
        check_data(cfg, ("train",))
