"""Packages for the test server: what is in them, that they score as they should, and that none is half written."""

import copy
import hashlib
import json
import re
import zipfile

import numpy as np
import pytest

from dk_detection.errors import UserError
from dk_detection.evaluation import shards
from dk_detection.evaluation.average_precision import Evaluation
from dk_detection.evaluation.results import ImageSet, read_results
from dk_detection.evaluation.submission import pack
from tests.evaluation.made_up import CATEGORIES, detections, truth, without, write
from tests.evaluation.test_average_precision import pycocotools_figures
from tests.evaluation.test_shards import files_of_at_most


@pytest.fixture(scope="module")
def content():
    return truth(12, np.random.default_rng(0))


@pytest.fixture(scope="module")
def results(content):
    return detections(content, np.random.default_rng(1))


@pytest.fixture
def images(tmp_path, content):
    """The set with its truth, so that a package can be scored."""
    return ImageSet.read(write(tmp_path / "instances_val.json", content))


@pytest.fixture
def of_detectron2(tmp_path, results):
    return [write(tmp_path / "coco_instances_results.json", results)]


@pytest.fixture
def of_mmdet(tmp_path, results):
    """Its masks have the boxes beside them."""
    boxes = write(tmp_path / "test.bbox.json", without(results, "segmentation"))
    return [boxes, write(tmp_path / "test.segm.json", results)]


def unpack(path) -> list[dict]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{path.stem}.json"]
        return json.loads(archive.read(archive.namelist()[0]))


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_packages(tmp_path, images, of_detectron2, results):
    box, mask = pack(of_detectron2, images, "DCN-v2", str(tmp_path / "out"))
    assert (box.kind, mask.kind) == ("bbox", "segm")
    for package in (box, mask):
        assert package.path == tmp_path / "out" / package.kind / "detections_val_DCN-v2_results.zip"
        assert (package.detections, package.dropped) == (len(results), 0)
        seen = {entry["image_id"] for entry in results}
        assert package.empty_images == len(images.images) - len(seen)
    boxes, masks = unpack(box.path), unpack(mask.path)
    assert all(entry.keys() == {"image_id", "category_id", "bbox", "score"} for entry in boxes)
    assert all(entry.keys() == {"image_id", "category_id", "segmentation", "score"} for entry in masks)
    for given, one, other in zip(results, boxes, masks, strict=True):
        assert one["bbox"] == pytest.approx(given["bbox"], abs=0.0002)
        assert other["segmentation"] == given["segmentation"]
        assert one["score"] == other["score"] and np.float32(one["score"]) == np.float32(given["score"])
    assert not re.search(r"\.\d{12}", zipfile.ZipFile(box.path).read(f"{box.path.stem}.json").decode())


def test_same_packages_from_both_frameworks(tmp_path, images, of_detectron2, of_mmdet, results):
    folder = str(tmp_path / "run")
    shards.claim(folder)
    for process in (0, 1):
        writer = shards.Writer(folder, process)
        for image in list(images.images)[process::2]:
            writer.write(image, without([e for e in results if e["image_id"] == image], "image_id"))
    found = [pack(of, images, "a", str(tmp_path / str(i))) for i, of in enumerate([of_detectron2, of_mmdet, [folder]])]
    for packages in zip(*found, strict=True):
        first, second, from_shards = (package.path for package in packages)
        assert digest(first) == digest(second)
        key = json.dumps
        assert sorted(map(key, unpack(from_shards))) == sorted(map(key, unpack(first)))
    assert [e["image_id"] for e in unpack(found[2][0].path)] == sorted(e["image_id"] for e in results)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_package_scores_as_its_results(tmp_path, images, of_mmdet, content, results, kind):
    packages = {package.kind: package.path for package in pack(of_mmdet, images, "a", str(tmp_path))}
    packed = list(read_results(str(packages[kind]), images))
    figures = list(Evaluation(copy.deepcopy(content), packed, kind).figures().values())
    assert figures == pytest.approx(pycocotools_figures(content, results, kind), abs=1e-4)
    if kind == "segm":  # with the boxes left in, small, medium and large are those of the boxes
        as_written = pycocotools_figures(content, without(results, "segmentation"), "bbox")
        assert as_written[3:] != pytest.approx(figures[3:], abs=0.05)


def test_scores_of_masks_of_their_own(tmp_path, images, results):
    folder = str(tmp_path / "run")
    shards.claim(folder)
    writer = shards.Writer(folder)
    for image in images.images:
        of_image = without([e for e in results if e["image_id"] == image], "image_id")
        writer.write(image, [dict(entry, mask_score=entry["score"] / 2) for entry in of_image])
    boxes, masks = (unpack(package.path) for package in pack([folder], images, "a", str(tmp_path)))
    assert [e["score"] / 2 for e in boxes] == pytest.approx([e["score"] for e in masks])


def test_the_best_hundred_of_an_image_are_kept(tmp_path, images):
    rng = np.random.default_rng(0)
    image = 10
    scores = rng.permutation(130).round(2) / 130
    scores[:4] = scores[40]  # of equal ones the first come first
    entries = [
        dict(image_id=image, category_id=2, bbox=[float(i), 1.0, 5.0, 5.0], score=float(s))
        for i, s in enumerate(scores)
    ] + [dict(image_id=13, category_id=2, bbox=[1.0, 1.0, 5.0, 5.0], score=0.001)]
    (package,) = pack([write(tmp_path / "r.json", entries)], images, "a", str(tmp_path))
    assert (package.detections, package.dropped, package.empty_images) == (101, 30, len(images.images) - 2)
    best = sorted(range(130), key=lambda i: -scores[i])[:100]
    assert [int(e["bbox"][0]) for e in unpack(package.path)[:-1]] == sorted(best)
    assert unpack(package.path)[-1]["image_id"] == 13


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([1.23456, 2.0, 3.0, 4.0], [1.2346, 2, 3, 4]),
        ([-0.6, -0.00004, 10.0, 10.0], [0, 0, 9.4, 10]),
        ([190.12345, 140.0, 10.2, 10.9], [190.1234, 140, 9.8766, 10]),
        ([200.4, 150.4, 0.0, 0.3], [200, 150, 0, 0]),
    ],
)
def test_boxes_are_inside_their_image(tmp_path, images, box, expected):
    entry = dict(image_id=10, category_id=2, bbox=box, score=0.5)
    (package,) = pack([write(tmp_path / "r.json", [entry])], images, "a", str(tmp_path))
    (packed,) = unpack(package.path)
    assert packed["bbox"] == expected


@pytest.mark.parametrize("name", ["", "a b", "a_b", "../a", "ä"])
def test_bad_names(tmp_path, images, of_detectron2, name):
    with pytest.raises(UserError, match="must be of letters, digits and hyphens"):
        pack(of_detectron2, images, name, str(tmp_path))


def test_empty_and_surplus_results(tmp_path, images, of_detectron2, of_mmdet):
    with pytest.raises(UserError, match="there is no detection in it"):
        pack([write(tmp_path / "r.json", [])], images, "a", str(tmp_path))
    with pytest.raises(UserError, match="the other files have what is in it"):
        pack([*of_mmdet, *of_detectron2], images, "a", str(tmp_path))


@pytest.fixture
def earlier(tmp_path, images, of_detectron2):
    """A package of an earlier time, under the same name."""
    return pack(of_detectron2, images, "a", str(tmp_path / "out"))[0].path


def test_nothing_half_written_is_left(tmp_path, images, earlier, results):
    before = digest(earlier)
    path = write(tmp_path / "r.json", results + [dict(results[0], image_id=999)])
    with pytest.raises(UserError, match=f"detection {len(results)}: image_id 999"):
        pack([path], images, "a", str(tmp_path / "out"))
    path = write(tmp_path / "r.json", results[:-1])
    with files_of_at_most(1000), pytest.raises(UserError, match=r"_results\.zip cannot be written"):
        pack([path], images, "a", str(tmp_path / "out"))
    assert digest(earlier) == before
    assert sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file()) == [earlier.name] * 2


def test_interrupted(tmp_path, images, of_detectron2, monkeypatch):
    def interrupt(entry, size):
        raise KeyboardInterrupt

    monkeypatch.setattr("dk_detection.evaluation.submission._format_mask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(of_detectron2, images, "a", str(tmp_path / "out"))
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_unwritable_folder(tmp_path, images, of_detectron2):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"_results\.zip cannot be written"):
        pack(of_detectron2, images, "a", str(tmp_path / "file"))


# Mutations of a valid file: each is accepted and scores as pycocotools scores it, or is refused in words.

_ODD = [None, True, -1, 0, 7, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "10", [], [1, 2], {}, {"size": 1}]


def mutate(text: str, rng: np.random.Generator) -> bytes:
    """A result file with one thing changed, of its bytes or of its content."""
    if rng.random() < 0.35:
        data = bytearray(text.encode())
        start, length = int(rng.integers(len(data))), int(rng.integers(1, 30))
        match rng.integers(5):
            case 0:
                del data[start:]
            case 1:
                del data[start : start + length]
            case 2:
                data[start] = int(rng.integers(256))
            case 3:
                data[start:start] = data[start : start + length]
            case 4:
                data[start] ^= 1 << int(rng.integers(7))
        return bytes(data)
    entries = json.loads(text)
    at = int(rng.integers(len(entries)))
    entry = entries[at]
    odd = _ODD[rng.integers(len(_ODD))]
    key = list(entry)[rng.integers(len(entry))]
    match rng.integers(11):
        case 0:
            entry[key] = odd
        case 1:
            del entry[key]
        case 2:
            entry["bbox"][rng.integers(4)] = odd
        case 3:
            entry["segmentation"][["size", "counts"][rng.integers(2)]] = odd
        case 4:
            entries.insert(at, copy.deepcopy(entry) if rng.random() < 0.5 else odd)
        case 5:
            rng.shuffle(entries)
        case 6:
            del entries[at:]
        case 7:
            entry["score"] = float(rng.random())
        case 8:
            entry["bbox"] = [float(v) for v in np.array(entry["bbox"]) + rng.normal(size=4) * rng.choice([0.1, 1, 30])]
        case 9:
            counts = list(entry["segmentation"]["counts"])
            place = int(rng.integers(len(counts)))
            counts[place : place + int(rng.integers(2))] = chr(int(rng.integers(48, 112)))
            entry["segmentation"]["counts"] = "".join(counts)
        case 10:
            entry["category_id"] = int(rng.choice([*CATEGORIES, 1, 80]))
    return json.dumps(entries, indent=int(rng.integers(3)) or None).encode()


def cut(entry: dict, images: ImageSet) -> dict:
    """A detection whose box ends where its image does."""
    if "bbox" not in entry:
        return entry
    height, width = images.images[entry["image_id"]]
    x, y, w, h = entry["bbox"]
    (left, right), (top, bottom) = np.clip([x, x + w], 0, width), np.clip([y, y + h], 0, height)
    return dict(entry, bbox=[left, top, right - left, bottom - top])


def test_mutations(tmp_path):
    rng = np.random.default_rng(0)
    content = truth(3, np.random.default_rng(0), objects=2)
    images = ImageSet.read(write(tmp_path / "instances_val.json", content))
    text = json.dumps(detections(content, np.random.default_rng(1), wrong=1))
    path = tmp_path / "r.json"
    accepted = 0
    for _ in range(1000):
        data = mutate(text, rng)
        path.write_bytes(data)
        try:
            packages = pack([str(path)], images, "a", str(tmp_path / "out"))
        except UserError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 500
            continue
        accepted += 1
        for package in packages:
            packed = list(read_results(str(package.path), images))
            figures = list(Evaluation(copy.deepcopy(content), packed, package.kind).figures().values())
            given = [cut(entry, images) for entry in json.loads(data)]
            expected = pycocotools_figures(content, given, package.kind)
            assert figures == pytest.approx(expected, abs=1e-4, nan_ok=True), data
    assert 200 < accepted < 800
