"""Inference of MMDetection's detectors: kept as it comes, resumed without loss, and scored as the framework scores."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.evaluation import CocoMetric
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from pycocotools import mask as rle

from dk_detection.datasets import deformed_shapes
from dk_detection.errors import UserError
from dk_detection.evaluation import shards
from dk_detection.evaluation.average_precision import Evaluation
from dk_detection.evaluation.results import ImageSet, read_results
from dk_detection.evaluation.submission import pack
from dk_detection.mmdet import inference
from tests.evaluation.made_up import detections, truth, without, write
from tests.resuming import check_goes_on

ROOT = Path(__file__).parents[2]
TINY = """
_base_ = ['{root}/configs/mmdet/deformed_shapes/mask-rcnn_r18_fpn_1k_deformed-shapes.py']
test_dataloader = dict(num_workers=0, persistent_workers=False)
model = dict(test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=4)))
tta_model = dict(
    type='DkTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=5, box_averaging=dict(iterations=1)))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(side, side), keep_ratio=True) for side in (96, 160)],
        [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)],
        [dict(type='PackDetInputs', meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction'))],
    ]),
]
"""


@pytest.fixture(autouse=True)
def plain_configs(monkeypatch):
    """The framework formats the config four times a run, which takes longer than all the rest."""
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **options: (text, True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny.py, tiny.pth (random weights) and shapes/, six images of the test set."""
    folder = tmp_path_factory.mktemp("inference")
    deformed_shapes.make(folder / "shapes", num_train=1, num_val=3, num_test=6)
    (folder / "tiny.py").write_text(TINY.format(root=ROOT.as_posix()))
    init_default_scope("mmdet")
    torch.manual_seed(0)
    detector = MODELS.build(Config.fromfile(folder / "tiny.py").model)
    torch.save(dict(state_dict=detector.state_dict()), folder / "tiny.pth")
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return ImageSet.read(str(folder / "shapes/annotations/image_info_test-dev.json"))


def run(folder, images, out, **options) -> list[dict]:
    config, checkpoint, pictures = (str(folder / name) for name in ("tiny.py", "tiny.pth", "shapes/test"))
    inference.run(config, checkpoint, images, pictures, str(out), **options)
    return list(read_results(str(out), images))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture(scope="module")
def whole(folder, images, finished):
    return run(folder, images, finished)


def test_results(whole, images):
    assert len(whole) == 4 * len(images.images)
    assert [entry["image_id"] for entry in whole] == sorted(entry["image_id"] for entry in whole)
    assert {entry["category_id"] for entry in whole} <= images.categories.keys()


@pytest.mark.parametrize("options", [dict(options=["model.test_cfg.rcnn.score_thr=0.1"]), dict(tta=True)])
def test_the_folder_of_another_inference(folder, images, whole, finished, options):
    with pytest.raises(UserError, match="with other config"):
        run(folder, images, finished, **options)


def test_interrupted_and_resumed(folder, images, whole, tmp_path):
    check_goes_on(lambda: run(folder, images, tmp_path), tmp_path, len(images.images), whole)


def test_processes_share_the_unfinished_images(tmp_path, monkeypatch):
    class Dataset(list):
        def get_data_info(self, index):
            return dict(img_id=self[index])

    dataset = Dataset([5, 3, 9, 7, 1, 8])
    shards.claim(str(tmp_path))
    shards.Writer(str(tmp_path)).write(9, [])
    shares = []
    for rank in range(3):
        monkeypatch.setattr(inference, "get_dist_info", lambda rank=rank: (rank, 3))
        sampler = inference.DkUnfinishedSampler(dataset, str(tmp_path))
        shares.append([dataset[i] for i in sampler])
        assert len(sampler) == len(shares[-1])
    assert shares == [[5, 1], [3, 8], [7]]


def test_augmentation(folder, images, whole, tmp_path):
    found = run(folder, images, tmp_path, tta=True)
    assert len(found) == 5 * len(images.images) and all("segmentation" in entry for entry in found)


def test_bad_input(folder, images, tmp_path):
    with pytest.raises(UserError, match=r"--tta: .* sets no tta_model; _base_/multi_scale_testing\.py has both"):
        run(folder, images, tmp_path, tta=True, options=["tta_model=None"])
    arguments = [str(folder / "tiny.py"), str(folder / "tiny.pth"), images, str(folder / "shapes/val"), str(tmp_path)]
    with pytest.raises(UserError, match="3 of 6 images are not there, such as"):
        inference.run(*arguments)
    arguments[3] = str(folder / "shapes/test")
    with pytest.raises(UserError, match="there is no such checkpoint"):
        inference.run(arguments[0], "gone.pth", *arguments[2:])
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="the checkpoint does not fit the model of this config"):
        inference.run(arguments[0], str(tmp_path / "empty.pth"), *arguments[2:4], str(tmp_path / "other"))
    content = json.loads(Path(images.path).read_text())
    content["categories"].reverse()
    turned = ImageSet.read(write(tmp_path / "image_info_turned.json", content))
    with pytest.raises(UserError, match="its categories are not the classes of the config in the same order"):
        inference.run(*arguments[:2], turned, *arguments[3:])
    with pytest.raises(UserError, match="test_dataloader has no dataset of COCO's kind, got VOCDataset"):
        inference.run(*arguments, options=["test_dataloader.dataset.type=VOCDataset"])


def test_test_set_of_a_config(folder, monkeypatch):
    monkeypatch.setenv("DK_DEFORMED_SHAPES_ROOT", "somewhere")
    assert inference.test_set(str(folder / "tiny.py")) == (
        "somewhere/annotations/instances_val.json",
        "somewhere/val/",
    )


def samples(found: list[dict], categories: list[int], images: ImageSet) -> list[dict]:
    """Predictions as the framework hands them to an evaluator."""
    samples = []
    for image, size in images.images.items():
        of_image = [entry for entry in found if entry["image_id"] == image]
        boxes = torch.tensor([entry["bbox"] for entry in of_image], dtype=torch.float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [rle.decode(entry["segmentation"]) for entry in of_image]
        instances = dict(
            bboxes=boxes,
            scores=torch.tensor([entry["score"] for entry in of_image]),
            labels=torch.tensor([categories.index(entry["category_id"]) for entry in of_image], dtype=torch.long),
            masks=torch.from_numpy(np.array(masks, bool).reshape(-1, *size)),
        )
        samples.append(dict(img_id=image, ori_shape=size, pred_instances=instances))
    return samples


def test_packages_score_what_the_framework_prints(tmp_path):
    content = truth(20, np.random.default_rng(0))
    images = ImageSet.read(write(tmp_path / "instances_val.json", content))
    found = samples(detections(content, np.random.default_rng(1)), list(images.categories), images)
    metric = CocoMetric(images.path, ["bbox", "segm"], outfile_prefix=str(tmp_path / "mmdet"))
    metric.dataset_meta = dict(classes=tuple(images.categories.values()))
    metric.process({}, found)
    printed = metric.evaluate(len(found))

    shards.claim(str(tmp_path / "run"))
    ours = inference.DkResultShards(str(tmp_path / "run"), list(images.categories))
    ours.process({}, found)
    assert ours.evaluate(len(found)) == {}
    own_files = [str(tmp_path / f"mmdet.{kind}.json") for kind in ("bbox", "segm")]
    for results in ([str(tmp_path / "run")], own_files):
        for package in pack(results, images, "a", str(tmp_path)):
            packed = list(read_results(str(package.path), images))
            figures = Evaluation(copy.deepcopy(content), packed, package.kind).figures()
            for name, key in zip(figures, ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"), strict=True):
                assert round(figures[name] / 100, 3) == printed[f"coco/{package.kind}_{key}"], (package, name)

    # The masks that the framework writes have boxes, and pycocotools judges their sizes by those.
    as_written = json.loads((tmp_path / "mmdet.segm.json").read_text())
    assert all("bbox" in entry for entry in as_written)
    by_box = Evaluation(copy.deepcopy(content), without(as_written, "segmentation"), "bbox")
    assert by_box.figures() != figures


def test_mask_scores(tmp_path):
    """Mask Scoring R-CNN scores boxes and masks by themselves."""
    shards.claim(str(tmp_path))
    instances = dict(
        bboxes=torch.tensor([[1.0, 2.0, 4.0, 6.0]]), scores=torch.tensor([0.5]), labels=torch.tensor([1])
    ) | dict(masks=torch.ones(1, 8, 9, dtype=torch.bool), mask_scores=torch.tensor([0.25]))
    metric = inference.DkResultShards(str(tmp_path), [4, 7])
    metric.process({}, [dict(img_id=3, pred_instances=instances)])
    (entry,) = shards.read(str(tmp_path), [3])
    assert (entry["category_id"], entry["bbox"]) == (7, [1, 2, 3, 4])
    assert (entry["score"], entry["mask_score"]) == (0.5, 0.25)
