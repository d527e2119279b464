"""Slips in the data of a config of Detectron2 are told before a run starts."""

import json
import shutil

import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from dk_detection.datasets import deformed_shapes
from dk_detection.detectron2.data import check_data
from dk_detection.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    deformed_shapes.make(root, num_train=3, num_val=2, num_test=1, image_size=64)
    return root


@pytest.fixture
def root(made, tmp_path):
    root = shutil.copytree(made, tmp_path / "shapes")
    for split in ("train", "val"):
        register_coco_instances(
            f"mine_{split}", {}, str(root / "annotations" / f"instances_{split}.json"), str(root / split)
        )
    yield root
    for split in ("train", "val"):
        DatasetCatalog.remove(f"mine_{split}")
        MetadataCatalog.remove(f"mine_{split}")


def change(root, split, function):
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


def check(**options) -> dict:
    return check_data(["mine_train"], ["mine_val"], masks=True, **options)


def refused(**options) -> str:
    with pytest.raises(UserError) as error:
        check(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_good_data(root, capsys):
    contents = check(num_classes={"model.roi_heads.num_classes": 6})
    train = root / "annotations" / "instances_train.json"
    assert contents == {str(train): json.loads(train.read_text())}  # the other file is read when it is needed
    out = capsys.readouterr().out
    assert f"{train}: learned from: 14 of 14 objects" in out
    assert "instances_val.json: judged: " in out
    assert set(check_data([], ["mine_val"], masks=True)) == {str(root / "annotations" / "instances_val.json")}


@pytest.mark.parametrize(
    ("split", "function", "message"),
    [
        (
            "val",
            lambda c: [x.update(id=7 - x["id"]) for x in c["categories"]],
            "those of mine_train are 'disc', 'triangle'",
        ),
        (
            "val",
            lambda c: c["categories"].insert(0, dict(id=0, name="background")),
            "its categories are 'background', ",
        ),
        (
            "train",
            lambda c: c["annotations"][1].update(category_id=7),
            "annotations[1]: category_id 7 is none of the ids",
        ),
        (
            "train",
            lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
            "nothing to learn from: 0 of 14 objects; not",
        ),
        ("train", lambda c: c["annotations"].clear(), "there is nothing to learn from: 0 of 0 objects"),
        ("train", lambda c: c["annotations"][1].update(iscrowd="0"), "annotations[1]: iscrowd is '0', expected 0 or 1"),
        (
            "train",
            lambda c: c["annotations"][1].update(segmentation=[1, 1, 5, 1, 5, 5]),
            "expected polygons of numbers",
        ),
        ("train", lambda c: c["annotations"][1].pop("segmentation"), "annotations[1] has no 'segmentation', and masks"),
        ("train", lambda c: c["annotations"][1].update(ignore=1), "annotations[1] has 'ignore' set"),
        ("val", lambda c: c["annotations"][0].update(id=0), "annotations[0]: id is 0, expected a number from 1 on"),
        ("val", lambda c: c["annotations"][0].pop("area"), "annotations[0] has no 'area'"),
        ("val", lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "there is nothing to compare with: 0 of "),
        ("train", lambda c: c["images"][-1].update(file_name="gone.png"), "there is no picture "),
        (
            "val",
            lambda c: c["images"][-1].update(width=32, height=48),
            "is 64 pixels wide and 64 high, and the annotation",
        ),
    ],
)
def test_flaw(root, split, function, message):
    change(root, split, function)
    found = refused()
    assert found.startswith(f"mine_{split}: the annotation file {root}/annotations/instances_{split}.json is broken: ")
    assert message in found


def test_run_length_encoded_masks(root):
    mask = dict(size=[64, 64], counts=[64 * 64])
    change(root, "train", lambda c: c["annotations"][1].update(segmentation=mask))
    assert (
        "annotations[1] has a run-length encoded mask, and polygons are asked for; write INPUT.MASK_FORM" in refused()
    )
    check(rle=True)


def test_classes(root):
    assert refused(num_classes={"MODEL.ROI_HEADS.NUM_CLASSES": 80}) == (
        "MODEL.ROI_HEADS.NUM_CLASSES is 80, and mine_train has 6 classes"
    )
    MetadataCatalog.get("mine_train").thing_classes = ["disc", "square"]
    assert "those of Detectron2's catalogue are 'disc', 'square' (2)" in refused()


def test_picture_that_is_never_opened(root):
    path = (
        root / "train" / json.loads((root / "annotations/instances_train.json").read_text())["images"][-1]["file_name"]
    )
    change(
        root,
        "train",
        lambda c: [a.update(iscrowd=1) for a in c["annotations"] if a["image_id"] == c["images"][-1]["id"]],
    )
    Image.new("RGB", (9, 9)).save(path)
    check()
    assert f"{path} is 9 pixels wide" in refused(filter_empty=False)
