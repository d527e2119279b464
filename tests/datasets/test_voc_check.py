"""The files of PASCAL VOC, and what may be wrong with them."""

import pytest

from dk_detection.datasets.voc_check import check_voc
from tests import voc

NAME = "2007_trainval_1"


@pytest.fixture
def folder(tmp_path):
    return voc.make(tmp_path) / "VOC2007"


def check(folder, classes=voc.CLASSES, **options) -> str:
    images = str(folder / "ImageSets/Main/trainval.txt")
    return check_voc(images, str(folder / "JPEGImages"), str(folder / "Annotations"), classes, **options)


def test_good_data(folder):
    assert check(folder) == "2 pictures; 20 of 20 objects of 2 of them are of the classes"
    assert check(folder, ["cat"], sample=1) == "2 pictures; 1 of 10 objects of 1 of them are of the classes"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ImageSets/Main/trainval.txt", None, r"there is no list of pictures .*trainval\.txt"),
        ("ImageSets/Main/trainval.txt", "\n\n", r"trainval\.txt names no picture"),
        ("ImageSets/Main/trainval.txt", f"{NAME} -1\n", rf"has the line '{NAME} -1', expected the name of a picture"),
        (f"JPEGImages/{NAME}.jpg", None, rf"names a picture without its file .*{NAME}\.jpg"),
        (f"Annotations/{NAME}.xml", None, rf"names a picture without its file .*{NAME}\.xml"),
        (f"Annotations/{NAME}.xml", "<annotation>", rf"the annotation .*{NAME}\.xml is broken: no element found"),
        (f"Annotations/{NAME}.xml", "<annotation/>", rf"{NAME}\.xml is broken: int\(\)"),
        (
            f"Annotations/{NAME}.xml",
            voc.annotation([("cat", (5, 5, 5, 9))]),
            r"a box is \[5\.0, 5\.0, 5\.0, 9\.0\], expected xmin < xmax and ymin < ymax",
        ),
    ],
)
def test_what_is_wrong_is_named(folder, file, content, message):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        check(folder)


def test_objects_of_no_class(folder):
    with pytest.raises(ValueError, match="no object of 2 pictures is of the classes, such as 'aeroplane'"):
        check(folder, ["zebra"])
