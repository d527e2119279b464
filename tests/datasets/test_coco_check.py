"""Flaws of COCO files are told with their place; what is left out is what the frameworks leave out."""

import copy
import json
import os
import random
import re
import sys

import numpy as np
import pytest
from PIL import Image

from dk_detection.datasets.coco_check import CocoFile, check_labels, handed_on
from tests.tools.command_line import ROOT

TRIANGLE = [[5.0, 5.0, 25.0, 5.0, 15.0, 20.0]]


def content(*annotations: dict) -> dict:
    """A file of two pictures and two categories, with an object for each dictionary: what is not as usual in it."""
    usual = dict(
        image_id=1,
        category_id=1,
        bbox=[5.0, 5.0, 20.0, 15.0],
        area=150.0,
        iscrowd=0,
        segmentation=copy.deepcopy(TRIANGLE),
    )
    return dict(
        images=[dict(id=i, file_name=f"{i}.png", width=60, height=40) for i in (1, 2)],
        categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
        annotations=[
            {k: v for k, v in (usual | dict(id=i + 1) | one).items() if v != "gone"}
            for i, one in enumerate(annotations)
        ],
    )


USES = {
    "mmdet": lambda file: file.learned_by_mmdet(masks=True),
    "mmdet boxes": lambda file: file.learned_by_mmdet(masks=False),
    "detectron2": lambda file: file.learned_by_detectron2(masks=True, rle=True),
    "judged": lambda file: file.judged(masks=True),
    "judged boxes": lambda file: file.judged(masks=False),
}
ALL = tuple(USES)
MASKS = ("mmdet", "detectron2", "judged")  # load_coco_json reads segmentations even where only boxes are learned
RLE = dict(size=[40, 60], counts=[600, 100, 1700])


# What a reader would fail on, or take for something else. Each once as in public reports, then as files of other tools.
@pytest.mark.parametrize(
    ("change", "uses", "message"),
    [
        # Crowds
        (dict(iscrowd="0"), ALL, r"annotations\[1\]: iscrowd is '0', expected 0 or 1"),
        (dict(iscrowd="false"), ALL, "iscrowd is 'false'"),
        (dict(iscrowd=None), ALL, "iscrowd is None"),
        (dict(iscrowd=2), ALL, "iscrowd is 2"),
        (dict(iscrowd=[]), ALL, r"iscrowd is \[\]"),
        (dict(iscrowd="gone"), ("judged", "judged boxes"), r"annotations\[1\] has no 'iscrowd'"),
        # Numbers
        (dict(bbox=[1, 2, float("nan"), 4]), ALL, r"annotations\[1\]: bbox\[2\] is nan, expected a number"),
        (dict(bbox=[1, None, 3, 4]), ALL, r"bbox\[1\] is None"),
        (dict(bbox=["1", 2, 3, 4]), ALL, r"bbox\[0\] is '1'"),
        (dict(bbox=[1, 2, 3, float("inf")]), ALL, r"bbox\[3\] is inf"),
        (dict(bbox=[[1, 2, 3, 4]]), ALL, r"bbox is \[\[1, 2, 3, 4\]\], expected \[x, y, width, height\]"),
        (dict(bbox=dict(x=1, y=2, w=3, h=4)), ALL, r"bbox is \{'x': 1"),
        (dict(bbox=[]), ALL, r"bbox is \[\]"),
        (dict(bbox="gone"), ALL, "has no 'bbox'"),
        (dict(area="150"), ("mmdet", "judged"), "area is '150', expected a number"),
        (dict(area=None), ("mmdet", "judged"), "area is None"),
        (dict(area=float("nan")), ("mmdet", "judged"), "area is nan"),
        (dict(area="gone"), ("mmdet boxes", "judged boxes"), "has no 'area'"),
        # Ids
        (dict(category_id=3), ALL, r"annotations\[1\]: category_id 3 is none of the ids in 'categories' \(1, 2\)"),
        (dict(category_id=0), ALL, "category_id 0 is none"),
        (dict(category_id="1"), ALL, r"category_id '1' is none of the ids in 'categories' \(1, 2\)"),
        (dict(category_id="cat"), ALL, "category_id 'cat' is none"),
        (dict(category_id=[1]), ALL, r"category_id is \[1\], expected a number"),
        (dict(image_id=[1]), ALL, r"image_id is \[1\], expected a number"),
        (
            dict(id=0),
            ("judged", "judged boxes"),
            "id is 0, expected a number from 1 on; a match with the object of id 0",
        ),
        (dict(id=-1), ("judged",), "id is -1, expected a number from 1 on"),
        (dict(id="a7"), ("judged",), "id is 'a7', expected a number from 1 on"),
        (dict(id=1.5), ("judged",), "id is 1.5, expected"),
        # Masks
        (
            dict(segmentation=[1, 1, 5, 1, 5, 5]),
            MASKS,
            r"segmentation is \[1, 1, 5, 1, 5, 5\], expected polygons of numb",
        ),
        (dict(segmentation="1,1,5,1,5,5"), MASKS, "segmentation is '1,1,5,1,5,5', expected polygons or an RLE"),
        (dict(segmentation=[[[1, 1], [5, 1], [5, 5]]]), MASKS, "expected polygons of numbers"),
        (dict(segmentation=[[1, 1, 5, None, 5, 5]]), MASKS, "expected polygons of numbers"),
        (dict(segmentation=[[1, 1, 5, float("nan"), 5, 5]]), MASKS, "expected polygons of numbers"),
        (dict(segmentation=[["1", "1", "5", "1", "5", "5"]]), MASKS, "expected polygons of numbers"),
        (dict(segmentation=[dict(x=1, y=1)]), MASKS, "expected polygons of numbers"),
        (
            dict(segmentation=dict(size=[60, 40], counts="abc")),
            MASKS,
            r"RLE of size \[60, 40\], .* 40 high and 60 wide",
        ),
        (dict(segmentation=dict(size=[80, 120], counts="abc")), MASKS, r"RLE of size \[80, 120\]"),
        (dict(segmentation=dict(size=[40, 60], counts=[10, 20])), MASKS, "expected counts that add up to 2400"),
        (dict(segmentation=dict(size=[40, 60], counts=[2400, None])), MASKS, "expected counts that add up to 2400"),
        (dict(segmentation=dict(counts="abc")), MASKS, "expected polygons or an RLE with counts and size"),
        (dict(segmentation="gone"), MASKS, r"annotations\[1\] has no 'segmentation', and masks are asked for"),
        (dict(segmentation=[]), MASKS, "has no 'segmentation'"),
        (dict(segmentation=None), MASKS, "has no 'segmentation'"),
        (
            dict(segmentation=[[1, 1, 5, 5]]),
            ("judged",),
            "the first polygon of its segmentation has fewer than 3 points",
        ),
        (dict(segmentation=[[1, 1], *TRIANGLE]), ("judged",), "has fewer than 3 points"),
        (dict(segmentation=[[], *TRIANGLE]), ("judged",), "has fewer than 3 points"),
        (dict(ignore=1), ("detectron2",), r"annotations\[1\] has 'ignore' set, which Detectron2"),
    ],
)
def test_flaw_of_an_object(change, uses, message):
    data = content({}, change, {})
    for use in uses:
        with pytest.raises(ValueError, match=message) as error:
            USES[use](CocoFile(data))
        assert "\n" not in str(error.value)
    if not {"mmdet boxes", "judged boxes"} & set(uses) and "segmentation" in change:  # boxes alone are in order
        for use in ("mmdet boxes", "judged boxes"):
            assert USES[use](CocoFile(data)).kept.all()


@pytest.mark.parametrize(
    ("change", "counts", "reason"),
    [
        # mmdet, mmdet boxes, detectron2, judged, judged boxes: of three objects
        (dict(area=0), (2, 2, 3, 3, 3), r"1 with an area of 0 or less \(first: annotations\[1\], id 2\)"),
        (dict(area=-150), (2, 2, 3, 2, 2), "1 with an area of 0 or less"),
        (dict(iscrowd=1, segmentation=RLE), (2,) * 5, "1 crowds"),
        (dict(iscrowd=True), (2,) * 5, "1 crowds"),
        (dict(iscrowd=1.0), (2,) * 5, "1 crowds"),
        (dict(bbox=[5, 5, 0, 15]), (2, 2, 2, 3, 3), "1 with a box narrower than a pixel"),
        (dict(bbox=[5, 5, 20, -15]), (2, 2, 2, 3, 3), "1 with a box narrower than a pixel"),
        (dict(bbox=[5, 5, 0.5, 15]), (2, 2, 3, 3, 3), "1 with a box narrower than a pixel"),
        (dict(bbox=[60, 5, 20, 15]), (2, 2, 2, 3, 3), "1 with a box outside of the picture"),
        (dict(bbox=[-30, 5, 20, 15]), (2, 2, 2, 3, 3), "1 with a box outside of the picture"),
        (dict(bbox=[5, 400, 20, 15]), (2, 2, 2, 3, 3), "1 with a box outside of the picture"),
        (dict(image_id=7), (2,) * 5, r"1 with an image_id that is none of the ids in 'images' \(1, 2\)"),
        (dict(image_id="1"), (2,) * 5, "1 with an image_id that is none"),
        (dict(segmentation=[[1, 1, 5, 5, 3]]), (2, 3, 2, 3, 3), "1 without a polygon of 3 points or more"),
        (dict(segmentation=[[1, 1, 5, 5, 3, 9, 2]]), (2, 3, 2, 3, 3), "1 without a polygon of 3 points or more"),
        (dict(segmentation=[*TRIANGLE, [1, 1]]), (3,) * 5, None),
        (dict(segmentation=RLE), (3,) * 5, None),
        (dict(ignore=1), (2, 2, None, 3, 3), "1 with ignore set"),
    ],
)
def test_objects_that_are_left_out(change, counts, reason):
    for (use, count), expected in zip(USES.items(), counts, strict=True):
        if expected is not None:
            assert np.count_nonzero(count(CocoFile(content({}, change, {}))).kept) == expected, use
    tally = USES["mmdet"](CocoFile(content({}, change, {})))
    assert [1] * bool(reason) == [1 for text in tally.reasons if re.match(reason, text)]
    assert str(tally).startswith(f"{counts[0]} of 3 objects")


def test_objects_that_nothing_can_match():
    file = CocoFile(content({}, dict(bbox=[5, 5, 0, 0]), dict(segmentation=[[1, 1, 5, 5, 3]])))
    for masks, number in ((False, 2), (True, 3)):
        assert file.judged(masks=masks).remarks == [
            f"1 that no detection can match, as they have no extent (first: annotations[{number - 1}], id {number})"
        ]


def test_boxes_that_are_parts_of_the_picture():
    """Numbers from 0 to 1: MMDetection leaves them all out, Detectron2 learns them."""
    file = CocoFile(content({"bbox": [0.25, 0.25, 0.5, 0.5]}))
    tally = file.learned_by_detectron2(masks=False)
    assert tally.kept[0] and "1 with a box narrower than a pixel (first: annotations[0]" in str(tally)
    assert not file.learned_by_mmdet(masks=False).kept[0]


def test_nothing_is_left():
    for change in (dict(area=0), dict(iscrowd=1), dict(image_id="1"), dict(bbox=[5, 5, 0, 0])):
        assert USES["mmdet boxes"](CocoFile(content(change, change))).is_vain()
    assert not USES["judged"](CocoFile(content())).is_vain()


def test_classes():
    file = CocoFile(content({}, dict(category_id=2), {}))
    tally = file.learned_by_mmdet(["cat", "bird"], masks=True)
    assert str(tally) == "2 of 3 objects; not 1 of categories that are not asked for (first: annotations[1], id 2)"
    assert file.without(tally.kept, ["cat", "dog"]) == "; none of 'dog'"
    assert file.without(file.known().kept) == ""
    assert file.images_of(tally.kept).tolist() == [True, False]
    assert np.count_nonzero(file.learned_by_mmdet(masks=False, min_size=41).kept) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].update(width="60"), r"images\[1\]: width is '60', expected a number"),
        (lambda c: c["images"][1].update(height=0), r"images\[1\]: height is 0, expected 1 or more"),
        (lambda c: c["images"][1].update(height=None), r"images\[1\]: height is None"),
        (lambda c: c["images"][1].update(file_name=7), r"images\[1\]: file_name is 7, expected a text"),
        (lambda c: c["images"][1].update(id=None), r"images\[1\]: id is None, expected a number"),
        (lambda c: c["images"][1].update(id=1), "the ids in 'images' are not unique"),
        (lambda c: c["images"][1].pop("id"), r"images\[1\] has no 'id'"),
        (lambda c: c.update(images={"1": {}}), "it has no list 'images'"),
        (lambda c: c["categories"][1].update(name=None), r"categories\[1\]: name is None"),
        (lambda c: c["categories"].append("dog"), r"categories\[2\] is 'dog', expected an object"),
        (lambda c: c["categories"][1].update(id=[2]), r"categories\[1\]: id is \[2\]"),
        (lambda c: c["annotations"].append(None), r"annotations\[1\] is None, expected an object"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "the ids in 'annotations' are not unique"),
        (lambda c: c.update(annotations=None), "it has no list 'annotations'"),
    ],
)
def test_flaw_of_a_file(change, message):
    data = content({})
    change(data)
    with pytest.raises(ValueError, match=message):
        CocoFile(data)


@pytest.mark.parametrize("text", ["", '{"images": [', "[]", "3", "\ufeff{}", '{"images": [1,]}'])
def test_no_coco_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"it is not valid JSON|it holds a "):
        CocoFile.read(str(tmp_path / "a.json"))


def test_labels():
    data = content()
    data["categories"] = [dict(id=7, name="dog"), dict(id=2, name="cat"), dict(id=4, name="bird")]
    file = CocoFile(data)
    assert file.labels() == ["dog", "cat", "bird"]
    assert file.labels(by_id=True) == ["cat", "bird", "dog"]
    assert file.labels(["bird", "dog"]) == ["dog", "bird"]
    check_labels(file.labels(), ("dog", "cat", "bird"), "the config")
    for labels, message in (
        (["dog", "bird", "cat"], r"those of b.json are 'dog', 'bird', 'cat' \(3\), unlike from label 1 on"),
        (["dog", "cat"], r"those of b.json are 'dog', 'cat' \(2\); they"),
        (["Dog", "cat", "bird"], "unlike from label 0 on"),
        (["dog", "dog", "cat", "bird"], r"\(4\), unlike from label 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_labels(file.labels(), labels, "b.json")


# Pictures.


@pytest.fixture
def pictures(tmp_path):
    for i in (1, 2):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_pictures(pictures):
    file = CocoFile(content({}))
    assert file.check_pictures(str(pictures)) == 2
    assert file.check_pictures(str(pictures), sample=1) == 1
    path = pictures / "2.png"
    turned = Image.Exif()
    turned[0x0112] = 6  # a telephone's picture, turned when it is read

    def write(**options):
        Image.new("RGB", options.pop("size", (60, 40))).save(path, **options)

    def cut(kind):
        Image.effect_noise((60, 40), 50).save(path, format=kind)
        path.write_bytes(path.read_bytes()[:-200])

    for change, message in (
        (path.unlink, f"there is no picture {path}$"),
        (path.mkdir, f"{path} is no picture that can be read"),
        (path.rmdir, "there is no picture"),
        (path.touch, f"there is nothing in the picture {path}$"),
        (lambda: path.write_text("<html>404 Not Found</html>"), f"{path} is no picture that can be read"),
        (lambda: cut("PNG"), f"{path} is no picture that can be read"),
        (lambda: cut("JPEG"), f"{path} is no picture that can be read"),
        (lambda: write(size=(40, 60)), f"{path} is 40 pixels wide and 60 high, and .* 60 and 40, the other way round"),
        (
            lambda: write(size=(120, 80)),
            f"{path} is 120 pixels wide and 80 high, and the annotation file says 60 and 40$",
        ),
        (lambda: write(format="JPEG", exif=turned), "40 pixels wide and 60 high, .*the other way round"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            file.check_pictures(str(pictures))
    assert file.check_pictures(str(pictures), needed=np.array([True, False])) == 1
    write(size=(40, 60), format="JPEG", exif=turned)
    assert file.check_pictures(str(pictures)) == 2
    write(format="JPEG")
    path.write_bytes(path.read_bytes() + bytes(99))  # more than the picture, as some cameras write
    assert file.check_pictures(str(pictures)) == 2
    write(format="PPM")
    assert file.check_pictures(str(pictures)) == 2


# The readers themselves.


def mess(number: int = 300) -> dict:
    """Objects with all that is well-formed and makes somebody leave them out, several at a time."""
    draw = random.Random(0)
    odd = dict(
        area=[0, -1, 0.5],
        iscrowd=[1, True],
        bbox=[
            [5, 5, 0, 9],
            [70, 5, 9, 9],
            [-9, 5, 9, 9],
            [5, 5, -3, 9],
            [59.5, 5, 9, 9],
            [5, 39.999999, 9, 9],
            [5, 5, 0.7, 9],
        ],
        image_id=[7],
        category_id=[2],
        segmentation=[[[1, 1, 5, 5, 3]], [*TRIANGLE, [1, 1]], [[1, 1, 5, 5, 3, 9, 2]]],
    )
    changes = []
    for _ in range(number):
        keys = draw.sample(list(odd), draw.choice([0, 1, 1, 2]))
        changes.append(
            {key: draw.choice(odd[key]) for key in keys}
            | ({} if "image_id" in keys else dict(image_id=draw.choice([1, 2])))
        )
    return content(*changes)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("classes", [("cat", "dog"), ("cat",)])
def test_mmdetection_learns_from_as_many(pictures, masks, classes):
    datasets = pytest.importorskip("mmdet.datasets", reason="MMDetection is not installed")
    from mmdet.datasets.transforms import LoadAnnotations

    path = pictures / "a.json"
    path.write_text(json.dumps(mess()))
    dataset = datasets.CocoDataset(
        ann_file=str(path),
        metainfo=dict(classes=classes),
        data_prefix=dict(img=""),
        pipeline=[],
        filter_cfg=dict(min_size=32),
    )
    load = LoadAnnotations(with_bbox=True, with_mask=masks)
    learned = 0
    for i in range(len(dataset)):
        info = load(dataset.get_data_info(i) | dict(ori_shape=(40, 60), img_shape=(40, 60)))
        learned += int((~info["gt_ignore_flags"]).sum())
    tally = CocoFile.read(str(path)).learned_by_mmdet(classes, masks=masks, min_size=32)
    assert np.count_nonzero(tally.kept) == learned
    assert 60 < learned < 200


@pytest.mark.parametrize("masks", [False, True])
def test_detectron2_learns_from_as_many(pictures, masks):
    coco = pytest.importorskip("detectron2.data.datasets.coco", reason="Detectron2 is not installed")
    from detectron2.data import DatasetMapper

    path = pictures / "a.json"
    path.write_text(json.dumps(mess()))
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR", use_instance_mask=masks)
    records = coco.load_coco_json(str(path), str(pictures))
    learned = sum(len(mapper(record)["instances"]) for record in records)
    assert np.count_nonzero(CocoFile.read(str(path)).learned_by_detectron2(masks=masks).kept) == learned
    assert 60 < learned < 250


def test_as_many_are_judged(tmp_path):
    pycocotools = pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert pycocotools
    path = tmp_path / "a.json"
    path.write_text(json.dumps(mess()))
    truth = COCO(str(path))
    found = truth.loadRes([dict(image_id=1, category_id=1, bbox=[0, 0, 5, 5], score=0.5)])
    for classes in (["cat", "dog"], ["dog"]):
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.catIds = truth.getCatIds(classes)
        evaluation.evaluate()
        images = [image for image in evaluation.evalImgs if image and image["aRng"] == [0, 1e10]]
        judged = sum(int((~np.array(image["gtIgnore"], bool)).sum()) for image in images)
        assert np.count_nonzero(CocoFile.read(str(path)).judged(classes, masks=False).kept) == judged
        assert judged > 20


def test_content_is_handed_on_once(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content({}, {})))
    file = CocoFile.read(str(path))
    other = tmp_path / "b.json"
    other.write_text(json.dumps(content({})))
    link = tmp_path / "link.json"
    link.symlink_to(path)
    contents, original = {os.path.realpath(path): file.content}, coco.COCO.__init__
    with handed_on(contents):
        assert len(coco.COCO(str(other)).anns) == 1
        first, second = coco.COCO(str(link)), coco.COCO(str(path))
        assert not coco.COCO().dataset
    assert first.dataset is file.content
    assert first.dataset == second.dataset
    assert second.dataset is not file.content
    assert len(first.imgToAnns[1]) == 2
    assert not contents
    assert coco.COCO.__init__ is original


# The command line.


@pytest.fixture
def check_data(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_data

    def run(*argv) -> tuple[int, str]:
        return check_data.main(list(map(str, argv))), capsys.readouterr().out

    yield run
    sys.modules.pop("check_data")


def test_command_line(check_data, pictures):
    train, val = pictures / "train.json", pictures / "val.json"
    train.write_text(json.dumps(content({}, dict(area=0), {})))
    val.write_text(json.dumps(content({}, {})))
    status, out = check_data(train, val, "--images", pictures)
    assert status == 0
    lines = out.splitlines()
    assert lines[:3] == [
        str(train),
        "  2 pictures, 3 objects, 2 categories",
        "  MMDetection learns boxes          2  not 1 with an area of 0 or less (first: annotations[1], id 2)",
    ]
    assert out.count("learns masks") == 4
    assert out.count("2 pictures are there, with the sizes that the file says") == 2
    status, out = check_data(val, "--framework", "detectron2", "--classes", "cat", "dog")
    assert (status, "MMDetection" in out) == (0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"].reverse(), "those of .*train.json are 'cat', 'dog'"),
        (lambda c: c["annotations"][0].update(id=0), "COCO metric judges boxes +fails  annotations.0.: id is 0"),
        (lambda c: c["annotations"][0].update(bbox=None), "MMDetection learns boxes +fails"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "COCO metric judges boxes +0  not 2 crowds"),
        (lambda c: c["images"][1].update(file_name="9.png"), "there is no picture .*9.png"),
        (lambda c: c.pop("categories"), "cannot be read: it has no list 'categories'"),
    ],
)
def test_command_line_finds(check_data, pictures, change, message):
    train, val, data = pictures / "train.json", pictures / "val.json", content({}, {})
    train.write_text(json.dumps(data))
    change(data)
    val.write_text(json.dumps(data))
    status, out = check_data(train, val, "--images", pictures)
    assert status == 1
    assert re.search(message, out)
