"""Slips in the data part of a config are told before a run starts, with the place and the file."""

import copy
import json
import re
import shutil

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from dk_detection.datasets import deformed_shapes
from dk_detection.errors import UserError
from dk_detection.mmdet.data_checks import check_data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    deformed_shapes.make(root, num_train=3, num_val=2, num_test=2, image_size=64)
    return root


@pytest.fixture(autouse=True)
def scope():
    """That of MMDetection's configs, under which a run checks."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


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


def test_what_is_neither_local_nor_of_a_known_kind_is_left_alone(root):
    cfg = config(root)
    cfg.train_dataloader.dataset.update(type="WIDERFaceDataset", ann_file="gone.txt")
    cfg.val_dataloader.dataset.data_root = "s3://bucket/coco/"
    cfg.test_dataloader.dataset.update(ann_file="gone.json", backend_args=dict(backend="petrel"))
    check_data(cfg, MODES)


# What belongs together.


@pytest.mark.parametrize(
    ("path", "where"),
    [(TRAIN, "train_dataloader.dataset"), (VAL, "val_dataloader.dataset"), ("x.json", "val_evaluator")],
)
def test_categories_in_another_order(root, path, where):
    cfg = config(root)
    if where == "val_evaluator":
        shutil.copy(root / VAL, root / path)
        cfg.val_evaluator.ann_file = str(root / path)
    rewrite(root / path, lambda c: c["categories"].reverse())
    message = refused(cfg)
    assert message.startswith(f"{where}: the annotation file {root}/{path} is broken: its categories are 'crescent', ")
    assert "those of the config are 'disc', 'triangle'" in message
    assert "unlike from label 0 on" in message


def test_category_that_is_twice_in_a_file(root):
    rewrite(root / VAL, lambda c: c["categories"].append(dict(id=9, name="disc")))
    assert "(7), and those of the config are" in refused(config(root))


def test_objects_of_both_kinds_are_counted(root, capsys):
    rewrite(root / TRAIN, lambda c: c["annotations"][1].update(area=0))
    rewrite(root / VAL, lambda c: c["annotations"][0].update(iscrowd=1))
    check_data(config(root), ("train", "val"))
    learned, judged = capsys.readouterr().out.splitlines()
    assert re.match(
        rf"{root}/{TRAIN}: learned from: 13 of 14 objects; not 1 with an area of 0 or less \(first: annotations\[1\]",
        learned,
    )
    assert re.match(rf"{root}/{VAL}: judged: \d+ of \d+ objects; not 1 crowds \(first: annotations\[0\], id ", judged)


@pytest.mark.parametrize(
    "change",
    [
        dict(area=0),
        dict(iscrowd=1),
        dict(bbox=[3, 3, 0, 4]),
        dict(bbox=[-9, -9, 4, 4]),
        dict(image_id="1"),
        dict(ignore=True),
        dict(segmentation=[[1, 1, 5, 5]]),
    ],
)
def test_nothing_is_left_to_learn_from(root, change):
    rewrite(root / TRAIN, lambda c: [annotation.update(change) for annotation in c["annotations"]] and None)
    message = refused(config(root))
    assert message.startswith("train_dataloader.dataset: there is nothing to learn from in the annotation file ")
    assert f"{root}/{TRAIN}: 0 of 14 objects; not 14 " in message
    assert "(first: annotations[0], id " in message


def test_nothing_is_left_to_compare_with(root, capsys):
    rewrite(root / VAL, lambda c: c["annotations"].clear())
    check_data(config(root), ("val",))
    assert f"{root}/{VAL}: judged: 0 of 0 objects" in capsys.readouterr().out
    cfg = config(root)
    cfg.val_evaluator.ann_file = str(root / TRAIN)
    cfg.val_dataloader.dataset.update(ann_file=TRAIN, data_prefix=dict(img="train/"))
    rewrite(root / TRAIN, lambda c: [annotation.update(iscrowd=1) for annotation in c["annotations"]] and None)
    message = refused(cfg, ("val",))
    assert message.startswith("val_evaluator: there is nothing to compare with in the annotation file ")
    assert f"{root}/{TRAIN}: 0 of 14 objects; not 14 crowds" in message


def test_masks_are_looked_at_where_they_are_used(root):
    rewrite(root / VAL, lambda c: c["annotations"][0].update(segmentation=[1, 1, 5, 1, 5, 5]))
    cfg = config(root)
    check_data(cfg, MODES)
    cfg.val_evaluator.metric = ["bbox", "segm"]
    assert refused(cfg).startswith("val_evaluator: the annotation file ")
    cfg.val_evaluator.metric = "bbox"
    cfg.val_dataloader.dataset.pipeline[1].with_mask = True
    assert refused(cfg).startswith("val_dataloader.dataset: the annotation file ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "there is no picture {}; "),
        (lambda path: path.write_bytes(b""), "there is nothing in the picture {}; "),
        (lambda path: path.write_text("<html>"), "{} is no picture that can be read; "),
        (lambda path: Image.new("RGB", (64, 32)).save(path), "{} is 64 pixels wide and 32 high"),
    ],
)
def test_picture_that_is_not_the_first(root, change, message):
    images = json.loads((root / TRAIN).read_text())["images"]
    path = root / "train" / images[-1]["file_name"]
    change(path)
    assert refused(config(root)).startswith(f"train_dataloader.dataset: {message.format(path)}")


def test_picture_that_is_never_opened(root):
    content = json.loads((root / TRAIN).read_text())
    image = content["images"][-1]
    rewrite(root / TRAIN, lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] != image["id"]]))
    (root / "train" / image["file_name"]).unlink()
    cfg = config(root)
    assert "there is no picture" in refused(cfg)
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
    check_data(cfg, MODES)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (dict(roi_head=dict(bbox_head=dict(type="Shared2FCBBoxHead", num_classes=3))), "model.roi_head.bbox_head"),
        (dict(roi_head=dict(mask_head=dict(type="FCNMaskHead", num_classes=80))), "model.roi_head.mask_head"),
        (dict(bbox_head=dict(type="RetinaHead", num_classes=7)), "model.bbox_head"),
        (dict(bbox_head=dict(type="YOLOXHead", num_classes=1)), "model.bbox_head"),
        (dict(roi_head=dict(bbox_head=[dict(num_classes=6), dict(num_classes=5)])), "model.roi_head.bbox_head[1]"),
        (dict(roi_head=dict(bbox_head=dict(type="Shared2FCBBoxHead"))), "model.roi_head.bbox_head"),  # 80 by default
        (dict(detector=dict(bbox_head=dict(type="FCOSHead", num_classes=20))), "model.detector.bbox_head"),
    ],
)
def test_head_of_another_number_of_classes(root, model, where):
    cfg = config(root)
    cfg.model = model
    assert re.fullmatch(
        rf"{re.escape(where)}.num_classes is \d+, and train_dataloader.dataset has 6 classes", refused(cfg)
    )


def test_heads_that_fit(root):
    cfg = config(root)
    cfg.model = dict(
        backbone=dict(type="X", num_classes=1000),
        rpn_head=dict(type="RPNHead", num_classes=1),
        roi_head=dict(bbox_head=dict(num_classes=6), mask_head=dict(type="FCNMaskHead", num_classes=6)),
    )
    check_data(cfg, MODES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(metainfo=dict(classes="disc")),
            "metainfo.classes is the text 'disc', expected a list; of one class it is ",
        ),
        (dict(metainfo=dict(classes="disc,square")), "metainfo.classes is the text 'disc,square'"),
        (
            dict(ann_file=[TRAIN, VAL]),
            f"ann_file is ['{TRAIN}', '{VAL}'], expected one path; several data sets are one as",
        ),
        (dict(ann_file=dict(train=TRAIN)), "ann_file is {'train': "),
        (dict(data_root=["a", "b"]), "data_root is ['a', 'b'], expected one path"),
        (dict(data_prefix="train/"), "data_prefix is 'train/', expected dict(img=...)"),
        (dict(data_prefix=dict(img_path="train/")), "sets no data_prefix.img"),
        (dict(data_prefix=dict(img=["a"])), "data_prefix.img is ['a'], expected one path"),
    ],
)
def test_settings_of_the_wrong_kind(root, change, message):
    cfg = config(root)
    for key, value in change.items():
        cfg.train_dataloader.dataset[key] = value
    found = refused(cfg)
    assert found.startswith("train_dataloader.dataset")
    assert message in found


def test_files_of_evaluators_of_the_wrong_kind(root):
    cfg = config(root)
    cfg.val_evaluator.ann_file = [VAL]
    assert refused(cfg).startswith(f"val_evaluator: ann_file is ['{VAL}'], expected one path")


def test_data_sets_with_rules_of_their_own_are_left_alone(root):
    cfg = config(root)
    rewrite(root / TRAIN, lambda c: [image.pop("file_name") for image in c["images"]] and None)  # as LVIS has it
    cfg.train_dataloader.dataset.type = "LVISV1Dataset"
    check_data(cfg, MODES)


def test_content_is_read_once(root):
    contents = check_data(config(root), MODES)
    assert set(contents) == {str(root / TRAIN), str(root / VAL)}
    assert contents[str(root / VAL)] == json.loads((root / VAL).read_text())
