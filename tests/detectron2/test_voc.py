"""The configs for PASCAL VOC on a miniature of its folders."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from dk_detection.detectron2.data import check_data
from dk_detection.detectron2.train import run
from dk_detection.detectron2.voc import DkVOCEvaluator
from dk_detection.errors import UserError
from tests import voc

CONFIG = Path(__file__).parents[2] / "configs/detectron2/dcnv1/class-aware-rpn_r101_dc5_30k_voc0712.py"
TRAIN, TEST = ["voc_2007_trainval", "voc_2012_trainval"], "voc_2007_test"


@pytest.fixture
def root(tmp_path):
    """The miniature under the names of Detectron2's own data sets."""
    names = [name for name in DatasetCatalog.list() if name.startswith("voc_")]
    old = Path(MetadataCatalog.get(TEST).dirname).parent

    def register(folder):
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_all_pascal_voc(str(folder))

    register(voc.make(tmp_path / "voc"))
    yield tmp_path / "voc"
    register(old)


def test_batches(root):
    cfg = LazyConfig.load(str(CONFIG))
    cfg.dataloader.train.update(num_workers=0, total_batch_size=4)
    found = next(iter(instantiate(cfg.dataloader.train)))
    assert len(found) == 4
    for one in found:
        assert len(one["instances"]) == 10
        assert one["image"].shape == (3, 600, 900)


def test_evaluator(root):
    """The boxes themselves, some moved by a part of their width: an IoU of about 0.6, above one threshold and below the
    other."""
    cfg = LazyConfig.load(str(CONFIG))
    cfg.dataloader.test.num_workers = 0
    evaluators = [instantiate(cfg.dataloader.evaluator), PascalVOCDetectionEvaluator(TEST), DkVOCEvaluator(TEST, (75,))]
    loader = instantiate(cfg.dataloader.test)
    truth = {entry["image_id"]: entry["annotations"] for entry in DatasetCatalog.get(TEST)}
    for evaluator in evaluators:
        evaluator.reset()
    for batch in loader:
        for one in batch:
            objects = truth[one["image_id"]]
            boxes = torch.tensor([each["bbox"] for each in objects])
            labels = torch.tensor([each["category_id"] for each in objects])
            boxes = boxes + torch.tensor([3.0, 0, 3, 0]) * (labels[:, None] < 5)
            found = Instances((voc.HEIGHT, voc.WIDTH), pred_boxes=Boxes(boxes), pred_classes=labels)
            found.scores = torch.ones(len(boxes))
            for evaluator in evaluators:
                evaluator.process([one], [{"instances": found}])
    ours, theirs, at_75 = (evaluator.evaluate()["bbox"] for evaluator in evaluators)
    assert ours == pytest.approx({"AP50": 100, "AP70": 75})
    assert ours["AP50"] == pytest.approx(theirs["AP50"]) and at_75["AP75"] == pytest.approx(theirs["AP75"])


def test_check_of_data(root, capsys):
    classes = {"model.num_classes": 20}
    assert check_data(TRAIN, [TEST], masks=False, num_classes=classes) == {}
    assert capsys.readouterr().out.count("2 pictures; 20 of 20 objects of 2 of them are of the classes") == 3
    with pytest.raises(UserError, match=r"model\.num_classes is 80, and voc_2007_trainval has 20 classes"):
        check_data(TRAIN, [], masks=False, num_classes={"model.num_classes": 80})
    (root / "VOC2012/Annotations/2012_trainval_0.xml").unlink()
    with pytest.raises(UserError, match=r"voc_2012_trainval: .*2012_trainval_0\.xml; set DETECTRON2_DATASETS to"):
        check_data(TRAIN, [], masks=False)


def test_command_line(root, tmp_path, capsys):
    """A narrow network trains two iterations, and what is found is said in VOC's figures."""
    (tmp_path / "tiny.py").write_text(f"""
from detectron2.config import LazyConfig
cfg = LazyConfig.load({str(CONFIG)!r})
dataloader, lr_multiplier, model, optimizer, train = (
    cfg[key] for key in ("dataloader", "lr_multiplier", "model", "optimizer", "train"))
train.update(max_iter=2, eval_period=2, init_checkpoint="", output_dir={str(tmp_path / "run")!r})
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.test.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
for stage in model.backbone.bottom_up.stages:
    stage.update(num_blocks=1, stride_per_block=stage.stride_per_block[:1])
model.update(pixel_std=[50.0] * 3, anchor_boundary_thresh=-1, test_score_thresh=0.0)
""")
    options = dict(opts=[], resume=False, eval_only=False, num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    run(Namespace(config_file=str(tmp_path / "tiny.py"), **options))
    assert "mAP@0.5 0.0, mAP@0.7 0.0 (PASCAL VOC metric, 0 to 100)" in capsys.readouterr().out.splitlines()[-2]
    assert (tmp_path / "run/model_final.pth").is_file()
