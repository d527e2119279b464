"""Result files of any size and shape are read, and what breaks a rule is named."""

import copy
import json
import zipfile

import numpy as np
import pytest
from pycocotools import mask as rle

from dk_detection.errors import UserError
from dk_detection.evaluation import results
from dk_detection.evaluation.results import ImageSet, read_results
from tests.evaluation.made_up import detections, truth, without, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """instances_val.json and right.json, detections with boxes and masks."""
    folder = tmp_path_factory.mktemp("results")
    content = truth(5, np.random.default_rng(0), objects=3)
    write(folder / "instances_val.json", content)
    write(folder / "right.json", detections(content, np.random.default_rng(1), wrong=1))
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return ImageSet.read(str(folder / "instances_val.json"))


@pytest.fixture(scope="module")
def right(folder):
    return json.loads((folder / "right.json").read_text())


def refusal(path, images) -> str:
    with pytest.raises(UserError) as error:
        list(read_results(str(path), images))
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("chunk", [1, 3, 50, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_any_chunk_and_layout(tmp_path, images, right, monkeypatch, chunk, indent):
    monkeypatch.setattr(results, "_CHUNK", chunk)
    monkeypatch.setattr(results, "_BLOCK", 4)
    path = tmp_path / "r.json"
    path.write_text(f" \n{json.dumps(right[:9], indent=indent)}\n")
    assert list(read_results(str(path), images)) == right[:9]


def test_a_package_is_a_result_file(tmp_path, images, right):
    with zipfile.ZipFile(tmp_path / "r.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("r.json", json.dumps(right))
    assert list(read_results(str(tmp_path / "r.zip"), images)) == right
    data = bytearray((tmp_path / "r.zip").read_bytes())
    data[200] ^= 255
    (tmp_path / "bad.zip").write_bytes(data)
    assert refusal(tmp_path / "bad.zip", images).startswith("the result file cannot be read")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.json", "[]")
        archive.writestr("b.json", "[]")
    assert "the archive holds 2 files, expected one" in refusal(tmp_path / "two.zip", images)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, images, right):
    text = json.dumps(without(right[:2], "segmentation"))
    path = tmp_path / "r.json"
    for end in range(len(text)):
        path.write_text(text[:end])
        refusal(path, images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not a JSON array of detections"),
        (b'{"annotations": []}', "it is not a JSON array"),
        (b"[1, 2]", "detection 0: it is 1, expected an object"),
        (b"[{}]", "detection 0: it has no image_id"),
        (b'[{"a": 1} {"b": 2}]', "expected ',' or ']' and found '{'"),
        (b"[] []", "there is more behind the array, character 3"),
        (b'[{"score": 0.5', "Expecting ',' delimiter, character 14 of 14"),
        (b'[{"score": 0.5}', "found the end of the file"),
        (b"[{'a': 1}]", "Expecting property name"),
        (b'[{"a": "\xff"}]', "can't decode byte 0xff"),
        (b"[" + b"[" * 100_000, "recursion"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "Exceeds the limit"),
    ],
)
def test_broken_json(tmp_path, images, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    assert message in refusal(path, images)


def test_gigantic_detection(tmp_path, images, monkeypatch):
    monkeypatch.setattr(results, "_MAX_ENTRY", 1000)
    monkeypatch.setattr(results, "_CHUNK", 100)
    path = tmp_path / "r.json"
    path.write_text('[{"a": "' + "x" * 5000)
    assert "a detection is longer than 1000 characters" in refusal(path, images)


def test_missing_file(tmp_path, images):
    assert "No such file" in refusal(tmp_path / "gone.json", images)


BAD_VALUES = [
    ({"image_id": 999}, "image_id 999 is not one of the 5 images of"),
    ({"image_id": "10"}, "image_id is '10', expected a whole number"),
    ({"image_id": 10.0}, "image_id is 10.0, expected a whole number"),
    ({"image_id": True}, "image_id is True"),
    ({"image_id": None}, "image_id is None"),
    ({"category_id": 5}, "category_id 5 is not one of the 3 categories of"),
    ({"category_id": 0}, "have to be mapped to them"),
    ({"category_id": [2]}, "category_id is [2]"),
    ({"score": float("nan")}, "score is nan, expected a number from 0 to 1"),
    ({"score": float("inf")}, "score is inf"),
    ({"score": 1.01}, "score is 1.01"),
    ({"score": -0.1}, "score is -0.1"),
    ({"score": "0.5"}, "score is '0.5'"),
    ({"score": 10**400}, "score is 1000"),
    ({"bbox": [1, 2, 3]}, "bbox is [1, 2, 3], expected four finite numbers"),
    ({"bbox": [1, 2, 3, None]}, "expected four finite numbers"),
    ({"bbox": [1, 2, float("nan"), 4]}, "expected four finite numbers"),
    ({"bbox": [1, 2, 10**400, 4]}, "expected four finite numbers"),
    ({"bbox": {"x": 1}}, "expected four finite numbers"),
    ({"bbox": [5.0, 5.0, -1.0, 5.0]}, "with a negative width or height"),
    ({"bbox": [-1.5, 5.0, 5.0, 5.0]}, "and the image has 160 x 210 pixels"),
    ({"bbox": [100.0, 5.0, 61.5, 5.0]}, "and the image has 160 x 210 pixels"),
    ({"bbox": [5.0, 200.0, 5.0, 12.0]}, "and the image has 160 x 210 pixels"),
    ({"segmentation": [[1, 1, 5, 1, 5, 5]]}, "expected a compressed RLE"),
    ({"segmentation": None}, "expected a compressed RLE"),
    ({"segmentation": {"size": [210, 160], "counts": [0, 33600]}}, "expected a compressed RLE"),
    ({"segmentation": {"size": [160, 210], "counts": "0"}}, "the mask has the size [160, 210], its image [210, 160]"),
    ({"segmentation": {"size": [210.0, 160], "counts": "0"}}, "the mask has the size [210.0, 160]"),
    ({"segmentation": {"size": [210, 160], "counts": ""}}, "the mask's counts '' do not fill its size"),
    ({"segmentation": {"size": [210, 160], "counts": "PPPP"}}, "do not fill its size [210, 160]"),
    ({"segmentation": {"size": [210, 160], "counts": "\u00e9"}}, "do not fill its size"),
    ({"segmentation": {"size": [210, 160], "counts": "5" * 10}}, "do not fill its size"),
]


@pytest.mark.parametrize(("change", "message"), BAD_VALUES)
def test_bad_values(tmp_path, images, right, change, message):
    entries = copy.deepcopy(right)
    third = next(i for i, entry in enumerate(entries) if i > 2 and images.images[entry["image_id"]] == (210, 160))
    entries[third].update(change)
    text = refusal(write(tmp_path / "r.json", entries), images)
    assert text.startswith(f"detection {third}: ") and message in text and len(text) < 300


@pytest.mark.parametrize("key", ["image_id", "category_id", "score"])
def test_missing_keys(tmp_path, images, right, key):
    assert f"it has no {key}" in refusal(write(tmp_path / "r.json", right[:1] + without(right[1:2], key)), images)


def test_all_are_of_the_same_kind(tmp_path, images, right):
    mixed = right[:1] + without(right[1:2], "bbox")
    message = "detection 1: it is of segm, those before of bbox and segm"
    assert message in refusal(write(tmp_path / "r.json", mixed), images)
    neither = without(right[:1], "bbox", "segmentation")
    assert "it has neither bbox nor segmentation" in refusal(write(tmp_path / "n.json", neither), images)


def test_copies(tmp_path, images, right):
    assert refusal(write(tmp_path / "r.json", right + right[1:3]), images) == (
        f"detection {len(right)} is a copy of detection 1; 2 are copies"
    )


def test_what_frameworks_round_is_accepted(tmp_path, images, right):
    entry = dict(right[0], bbox=[-0.5, 0.0, 12.0, 0.0], surplus="x")
    assert list(read_results(write(tmp_path / "r.json", [entry]), images)) == [entry]


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    masks = [rng.random((h, w)) < rng.random() for h, w in rng.integers(1, 40, (300, 2))]
    masks += [np.zeros((7, 5)), np.ones((7, 5)), np.zeros((3000, 4000)), np.ones((3000, 4000))]
    entries = []
    for mask in masks:
        encoded = rle.encode(np.asfortranarray(mask, np.uint8))
        entries.append(dict(segmentation=dict(size=encoded["size"], counts=encoded["counts"].decode())))
    assert results._fill(entries)
    for i, entry in enumerate(entries):
        assert results._fill([entry])
        size = entry["segmentation"]["size"]
        assert not results._fill(
            [*entries[:i], dict(segmentation=dict(entry["segmentation"], size=[size[0] + 1, size[1]]))]
        )


@pytest.mark.parametrize("counts", ["0", "W0", "PPPPPPPPP0", "1_O", "00", "11O"])
def test_run_lengths_that_are_none(counts):
    assert not results._fill([dict(segmentation=dict(size=[6, 5], counts=counts))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "this is no COCO annotation file, it has no list of images"),
        (b"{", "the annotation file cannot be read"),
        (b"\xff", "the annotation file cannot be read"),
        (b'{"images": [], "categories": [{"id": 1}]}', "no list of images"),
        (b'{"images": [{"id": 1, "height": 2, "width": 3}]}', "no list of categories"),
        (b'{"images": [{"id": "1", "height": 2, "width": 3}]}', "images[0] has no whole numbers id, height, width"),
        (b'{"images": [7]}', "images[0] has no whole numbers id, height, width"),
        (
            b'{"images": [{"id": 1, "height": 2, "width": 3}, {"id": 1, "height": 2, "width": 3}]}',
            "images[1] has id 1, and so has one before it",
        ),
    ],
)
def test_bad_annotation_files(tmp_path, content, message):
    path = tmp_path / "instances_val.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        ImageSet.read(str(path))
    assert message in str(error.value)


def test_name_of_the_set(tmp_path, images):
    assert images.name == "val"
    content = dict(images=[dict(id=1, height=2, width=3)], categories=[dict(id=1, name="a")])
    assert ImageSet.read(write(tmp_path / "image_info_test-dev2017.json", content)).name == "test-dev2017"
    with pytest.raises(UserError, match=r"expected image_info_SET.json or instances_SET.json"):
        _ = ImageSet.read(write(tmp_path / "mine.json", content)).name
    with pytest.raises(UserError, match="there are no annotations to compare with"):
        ImageSet.read(write(tmp_path / "image_info_a.json", content)).with_annotations()
