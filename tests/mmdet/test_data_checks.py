"""Slips in the data part of a config are told before a run starts, with the place and the file."""

import copy
import json
import shutil

import pytest
from mmengine.config import Config

from dk_detection.datasets import deformed_shapes
from dk_detection.errors import UserError
from dk_detection.mmdet.data_checks import check_data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    deformed_shapes.make(root, num_train=3, num_val=2, num_test=2, image_size=64)
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shapes")


def config(root) -> Config:
    def loader(split, masks=False):
        pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=masks)]
        return dict(
            dataset=dict(
                type="CocoDataset",
                data_root=str(root),
                metainfo=dict(classes=deformed_shapes.CLASSES),
                ann_file=f"annotations/instances_{split}.json",
                data_prefix=dict(img=f"{split}/"),
                pipeline=pipeline,
            )
        )

    evaluator = dict(type="CocoMetric", ann_file=str(root / "annotations/instances_val.json"), metric="bbox")
    return Config(
        dict(
            train_dataloader=loader("train", masks=True),
            val_dataloader=loader("val"),
            test_dataloader=loader("val"),
            val_evaluator=evaluator,
            test_evaluator=copy.deepcopy(evaluator),
        )
    )


MODES = ("train", "val", "test")
TRAIN, VAL = "annotations/instances_train.json", "annotations/instances_val.json"


def refused(cfg, modes=MODES) -> str:
    with pytest.raises(UserError) as error:
        check_data(cfg, modes)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path, change):
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))


def test_good_data(root):
    check_data(config(root), MODES)


def test_real_coco(tiny_coco):
    for task in ("detection", "instance"):
        cfg = Config.fromfile(f"configs/mmdet/_base_/coco_{task}.py")
        for mode in MODES:
            cfg[f"{mode}_dataloader"].dataset.data_root = str(tiny_coco)
            if mode != "train":
                cfg[f"{mode}_evaluator"].ann_file = str(tiny_coco / "annotations/instances_val2017.json")
        check_data(cfg, MODES)


def test_no_data_at_all(root):
    shutil.rmtree(root)
    message = refused(config(root))
    assert message.startswith(
        f"train_dataloader.dataset: there is no annotation file {root}/{TRAIN}; make it with `python -m"
    )


def test_variable_of_the_config_is_named(root, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "data_root = '{{$MY_ROOT:nowhere}}'\n"
        "train_dataloader = dict(dataset=dict(type='CocoDataset', data_root=data_root, ann_file='a.json'))"
    )
    message = refused(Config.fromfile(path))
    assert message == (
        "train_dataloader.dataset: there is no annotation file nowhere/a.json; set MY_ROOT to the folder of the data"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is not valid JSON \(Expecting value: line 1"),
        ('{"images": [', "is not valid JSON"),
        ("[]", "holds a list, expected an object"),
        ("{}", "has no list 'images'"),
        ('{"images": []}', "its list 'images' is empty"),
        ('{"images": [3]}', r"images\[0\] is 3, expected an object"),
        ('{"images": [{"id": 1, "file_name": "x", "height": 1}]}', r"images\[0\] has no 'width'"),
    ],
)
def test_broken_annotation_file(root, content, message):
    (root / VAL).write_text(content)
    with pytest.raises(
        UserError, match=f"^val_dataloader.dataset: the annotation file .*_val.json is broken: .*{message}"
    ):
        check_data(config(root), MODES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories") and None, "it has no list 'categories'"),
        (lambda c: c["categories"][0].pop("name") and None, r"categories\[0\] has no 'name'"),
        (lambda c: c["annotations"][1].pop("bbox") and None, r"annotations\[1\] has no 'bbox'"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, 3]),
            r"annotations\[1\]: bbox is \[1, 2, 3\], expected \[x, y",
        ),
        (lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]), "ids in 'annotations' are not unique"),
        (
            lambda c: c["annotations"][0].pop("segmentation") and None,
            r"annotations\[0\] has no 'segmentation', and masks are asked for",
        ),
        (lambda c: c.pop("annotations") and None, "has no 'annotations'"),
        (lambda c: c["annotations"].clear(), "has no annotations, there is nothing to learn from"),
        (
            lambda c: c["categories"][2].update(name="box"),
            r"has no category 'square' \(1 of 6 classes are missing; it has box",
        ),
        (lambda c: c["images"][0].update(file_name="gone.png"), "there is no picture .*train/gone.png; .* names it"),
    ],
)
def test_flaw_in_an_annotation_file(root, change, message):
    rewrite(root / TRAIN, change)
    with pytest.raises(UserError, match=f"^train_dataloader.dataset: .*{message}"):
        check_data(config(root), MODES)
    check_data(config(root), ("val", "test"))


def test_default_classes_are_coco(root):
    cfg = config(root)
    del cfg.train_dataloader.dataset.metainfo
    assert "has no category 'person' (80 of 80 classes are missing; it has crescent, cross, disc" in refused(cfg)


def test_image_folder(root):
    cfg = config(root)
    cfg.val_dataloader.dataset.data_prefix.img = "valid/"
    assert refused(cfg).startswith(f"val_dataloader.dataset: there is no image folder {root}/valid/; make it with")


def test_absolute_paths_do_not_need_a_root(root):
    cfg = config(root)
    dataset = cfg.train_dataloader.dataset
    dataset.ann_file, dataset.data_prefix.img = str(root / TRAIN), str(root / "train")
    dataset.data_root = "elsewhere"
    check_data(cfg, MODES)
    dataset.data_root = None
    check_data(cfg, MODES)


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda d: dict(type="RepeatDataset", times=2, dataset=d), ".dataset"),
        (lambda d: dict(type="ClassBalancedDataset", oversample_thr=0.1, dataset=d), ".dataset"),
        (lambda d: dict(type="ConcatDataset", datasets=[copy.deepcopy(d), d]), ".datasets[1]"),
        (
            lambda d: dict(type="MultiImageMixDataset", dataset=dict(type="ConcatDataset", datasets=[d]), pipeline=[]),
            ".dataset.datasets[0]",
        ),
    ],
)
def test_wrappers_are_followed(root, wrap, where):
    cfg = config(root)
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = wrap(dataset)
    check_data(cfg, MODES)
    inner = cfg.train_dataloader.dataset
    for part in where.removeprefix(".").replace("]", "").replace("[", ".").split("."):
        inner = inner[int(part) if part.isdigit() else part]
    inner.ann_file = "gone.json"
    assert refused(cfg).startswith(f"train_dataloader.dataset{where}: there is no annotation file {root}/gone.json")


def test_evaluator(root):
    cfg = config(root)
    cfg.val_evaluator.ann_file = str(root / "gone.json")
    assert refused(cfg) == f"val_evaluator: there is no annotation file {root}/gone.json"
    cfg.val_evaluator = [dict(type="CocoMetric"), cfg.val_evaluator]
    assert refused(cfg).startswith("val_evaluator[1]: there is no")
    cfg.val_evaluator[1].ann_file = str(root / "annotations/image_info_test-dev.json")
    assert "has no 'annotations' to compare with" in refused(cfg)


def test_evaluator_of_other_images(root):
    rewrite(root / VAL, lambda c: c["images"][0].update(id=77))
    shutil.copy(root / TRAIN, root / "other.json")
    cfg = config(root)
    cfg.test_evaluator.ann_file = str(root / "other.json")
    assert refused(cfg) == (
        f"test_evaluator: the annotation file {root}/other.json lacks images of test_dataloader, such as the one with "
        "id 77; both have to name the same file"
    )


def test_test_dev_needs_no_annotations_when_results_are_only_formatted(root):
    cfg = config(root)
    cfg.test_dataloader.dataset.update(ann_file="annotations/image_info_test-dev.json", data_prefix=dict(img="test/"))
    cfg.test_evaluator.ann_file = str(root / "annotations/image_info_test-dev.json")
    assert "has no 'annotations'" in refused(cfg)
    cfg.test_evaluator.format_only = True
    check_data(cfg, MODES)


def test_what_is_not_local_coco_is_left_alone(root):
    cfg = config(root)
    cfg.train_dataloader.dataset.update(type="VOCDataset", ann_file="gone.txt")
    cfg.val_dataloader.dataset.data_root = "s3://bucket/coco/"
    cfg.test_dataloader.dataset.update(ann_file="gone.json", backend_args=dict(backend="petrel"))
    check_data(cfg, MODES)
