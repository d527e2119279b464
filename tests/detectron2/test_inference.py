"""Inference of Detectron2's detectors: kept as it comes, resumed without loss, and scored as the framework scores."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle

from dk_detection.datasets import deformed_shapes
from dk_detection.detectron2 import inference, jobs
from dk_detection.errors import UserError
from dk_detection.evaluation import shards
from dk_detection.evaluation.average_precision import Evaluation
from dk_detection.evaluation.results import ImageSet, read_results
from dk_detection.evaluation.submission import pack
from tests.detectron2 import small
from tests.evaluation.made_up import detections, truth, write
from tests.resuming import check_goes_on

ROOT = Path(__file__).parents[2]
TINY = """
from detectron2.config import LazyConfig

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load_rel(
    "{base}", ("dataloader", "lr_multiplier", "model", "optimizer", "train"))
dataloader.test.num_workers = 0
model.roi_heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=4)
tta = dict(min_sizes=[96, 160], max_size=160, box_averaging=dict(iterations=1))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny.py and tiny.yaml, .pth files of random weights, and shapes/, six images of the test set."""
    folder = tmp_path_factory.mktemp("inference")
    deformed_shapes.make(folder / "shapes", num_train=1, num_val=3, num_test=6)
    base = ROOT / "configs/detectron2/deformed_shapes/mask-rcnn_r18_fpn_1k_deformed-shapes.py"
    (folder / "tiny.py").write_text(TINY.format(base=os.path.relpath(base, folder)))
    options = ("DATASETS.TEST", "('deformed_shapes_val',)", "DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TEST", 96)
    cfg = small.config("MODEL.ROI_HEADS.NUM_CLASSES", 6, *options)
    (folder / "tiny.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    models = {"py": instantiate(LazyConfig.load(str(folder / "tiny.py")).model), "yaml": build_model(cfg)}
    for suffix, model in models.items():
        torch.save(dict(model=model.state_dict()), folder / f"{suffix}.pth")
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return ImageSet.read(str(folder / "shapes/annotations/image_info_test-dev.json"))


def run(folder, images, out, suffix="py", **options) -> list[dict]:
    config, checkpoint, pictures = (str(folder / name) for name in (f"tiny.{suffix}", f"{suffix}.pth", "shapes/test"))
    inference.run(config, checkpoint, images, pictures, str(out), **options)
    return list(read_results(str(out), images))


@pytest.fixture(scope="module")
def whole(folder, images, tmp_path_factory):
    return run(folder, images, tmp_path_factory.mktemp("whole") / "run")


def test_results(whole, images):
    assert len(whole) == 4 * len(images.images)
    assert [entry["image_id"] for entry in whole] == sorted(entry["image_id"] for entry in whole)
    assert {entry["category_id"] for entry in whole} <= images.categories.keys()


def test_interrupted_and_resumed(folder, images, whole, tmp_path):
    check_goes_on(lambda: run(folder, images, tmp_path), tmp_path, len(images.images), whole)
    assert run(folder, images, tmp_path) == whole  # finished: nothing is left to do
    for options in (dict(options=["model.roi_heads.box_predictor.test_nms_thresh=0.3"]), dict(tta=True)):
        with pytest.raises(UserError, match="with other config"):
            run(folder, images, tmp_path, **options)


@pytest.mark.parametrize("tta", [False, True])
def test_yaml(folder, images, tmp_path, tta):
    options = ["TEST.AUG.MIN_SIZES", "(64, 96)", "TEST.AUG.BOX_AVERAGING.ITERATIONS", "1"]
    found = run(folder, images, tmp_path, "yaml", tta=tta, options=options)
    assert len(found) == 5 * len(images.images) and all("segmentation" in entry for entry in found)


def test_augmentation_sees_the_images_as_they_are(folder, images, whole, tmp_path, monkeypatch):
    seen = []
    augment = jobs.tta_of_lazy_config

    def spy(settings, model):
        augmented = augment(settings, model)
        mapper = augmented.tta_mapper
        augmented.tta_mapper = lambda given: (seen.append(tuple(given["image"].shape)), mapper(given))[1]
        return augmented

    monkeypatch.setattr(jobs, "tta_of_lazy_config", spy)
    found = run(folder, images, tmp_path, tta=True, options=["dataloader.test.mapper.augmentations.0.max_size=64"])
    assert len(found) == len(whole) and set(seen) == {(3, 128, 128)}


def test_bad_input(folder, images, tmp_path):
    arguments = [str(folder / "tiny.py"), str(folder / "py.pth"), images, str(folder / "shapes/val"), str(tmp_path)]
    with pytest.raises(UserError, match="3 of 6 images are not there, such as"):
        inference.run(*arguments)
    arguments[3] = str(folder / "shapes/test")
    with pytest.raises(UserError, match="there is no such checkpoint"):
        inference.run(arguments[0], "gone.pth", *arguments[2:])
    torch.save({"model": {}}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"empty.pth: the checkpoint does not fit .* is missing and \d+ more"):
        inference.run(arguments[0], str(tmp_path / "empty.pth"), *arguments[2:])
    (tmp_path / "cut.pth").write_bytes((folder / "py.pth").read_bytes()[:999])
    with pytest.raises(UserError, match=r"cut\.pth: the checkpoint cannot be read"):
        inference.run(arguments[0], str(tmp_path / "cut.pth"), *arguments[2:4], str(tmp_path / "cut"))
    with pytest.raises(UserError, match="it has 6 categories, the config's detector 3"):
        inference.run(*arguments, options=["model.roi_heads.num_classes=3"])


def test_categories_of_another_data_set(folder, images, tmp_path):
    content = json.loads(Path(images.path).read_text())
    content["categories"][0]["name"] = "ball"
    other = ImageSet.read(write(tmp_path / "image_info_other.json", content))
    register_coco_instances(
        "shapes_of_the_test", {}, str(folder / "shapes/annotations/instances_val.json"), str(folder / "shapes/val")
    )
    try:
        with pytest.raises(
            UserError, match="not those of shapes_of_the_test in the same order; number 0 is 'ball' here"
        ):
            run(folder, other, tmp_path, options=["dataloader.test.dataset.names=shapes_of_the_test"])
        config = str(folder / "tiny.py")
        assert inference.test_set(config, ["dataloader.test.dataset.names=shapes_of_the_test"]) == (
            str(folder / "shapes/annotations/instances_val.json"),
            str(folder / "shapes/val"),
        )
    finally:
        DatasetCatalog.remove("shapes_of_the_test")
        MetadataCatalog.remove("shapes_of_the_test")
    with pytest.raises(UserError, match="its test set is not one of COCO's kind, got nowhere"):
        inference.test_set(config, ["dataloader.test.dataset.names=nowhere"])


def test_packages_score_what_the_framework_prints(tmp_path):
    content = truth(20, np.random.default_rng(0))
    images = ImageSet.read(write(tmp_path / "instances_val.json", content))
    found, ids = detections(content, np.random.default_rng(1)), sorted(images.categories)
    inputs, outputs = [], []
    for image, size in images.images.items():
        of_image = [entry for entry in found if entry["image_id"] == image]
        boxes = torch.tensor([entry["bbox"] for entry in of_image], dtype=torch.float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [rle.decode(entry["segmentation"]) for entry in of_image]
        instances = Instances(
            size,
            pred_boxes=Boxes(boxes),
            scores=torch.tensor([entry["score"] for entry in of_image]),
            pred_classes=torch.tensor([ids.index(entry["category_id"]) for entry in of_image], dtype=torch.long),
            pred_masks=torch.from_numpy(np.array(masks, bool).reshape(-1, *size)),
        )
        inputs.append(dict(image_id=image))
        outputs.append(dict(instances=instances))

    register_coco_instances("made_up", {}, images.path, "")
    try:
        DatasetCatalog.get("made_up")
        evaluator = COCOEvaluator("made_up", output_dir=str(tmp_path), use_fast_impl=False)
        evaluator.reset()
        evaluator.process(inputs, outputs)
        printed = evaluator.evaluate()
    finally:
        DatasetCatalog.remove("made_up")
        MetadataCatalog.remove("made_up")
    shards.claim(str(tmp_path / "run"))
    ours = inference.ResultShards(str(tmp_path / "run"), ids)
    ours.process(inputs, outputs)
    assert ours.evaluate() == {}
    for results in (tmp_path / "run", tmp_path / "coco_instances_results.json"):
        for package in pack([str(results)], images, "a", str(tmp_path)):
            packed = list(read_results(str(package.path), images))
            figures = Evaluation(copy.deepcopy(content), packed, package.kind).figures()
            for name, key in zip(figures, ("AP", "AP50", "AP75", "APs", "APm", "APl"), strict=True):
                assert figures[name] == pytest.approx(printed[package.kind][key], abs=1e-4), (package, name)
