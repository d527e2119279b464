"""Results of an inference survive whatever ends it, and are there once."""

import resource
from contextlib import contextmanager

import pytest

from dk_detection.errors import UserError
from dk_detection.evaluation import shards

IDENTITY = {"config": b"a", "checkpoint": b"b"}


def detection(score: float) -> dict:
    return dict(category_id=1, bbox=[1.0, 2.0, 3.0, 4.0], score=score)


@pytest.fixture
def folder(tmp_path):
    shards.claim(str(tmp_path / "run"), **IDENTITY)
    return str(tmp_path / "run")


@contextmanager
def files_of_at_most(size: int):
    """For the system a file that would become larger is one for which the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_results_come_back_in_the_order_of_the_images(folder):
    first, second = shards.Writer(folder, 0), shards.Writer(folder, 1)
    first.write(7, [detection(0.1), detection(0.2)])
    second.write(3, [])
    second.write(5, [detection(0.3)])
    first.write(5, [detection(0.3)])  # padding of a sampler: the same image in two processes
    assert set(shards.finished(folder)) == {3, 5, 7}
    assert list(shards.read(folder, [3, 5, 7])) == [
        dict(image_id=5, **detection(0.3)),
        dict(image_id=7, **detection(0.1)),
        dict(image_id=7, **detection(0.2)),
    ]
    with pytest.raises(UserError, match="1 of 2 images are not finished"):
        list(shards.read(folder, [3, 4]))


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_being_written_does_not_count(folder, cut):
    writer = shards.Writer(folder)
    writer.write(1, [detection(0.5)])
    writer.write(2, [detection(0.6)])
    writer.close()
    path = next(iter(shards.finished(folder).values()))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert set(shards.finished(folder)) == {1}
    shards.Writer(folder).write(2, [detection(0.6)])
    assert path.read_bytes() == whole


def test_a_folder_belongs_to_one_inference(folder, tmp_path):
    shards.claim(folder, **IDENTITY)
    with pytest.raises(UserError, match="holds the results of an inference with other checkpoint: choose another"):
        shards.claim(folder, config=b"a", checkpoint=b"c")
    (tmp_path / "run" / "inference.json").write_text("{")
    with pytest.raises(UserError, match="cannot be kept there"):
        shards.claim(folder, **IDENTITY)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be kept there"):
        shards.claim(str(tmp_path / "file" / "run"), **IDENTITY)


def test_two_runs_do_not_write_the_same_file(folder):
    writer = shards.Writer(folder)
    with pytest.raises(UserError, match="another run is writing there"):
        shards.Writer(folder)
    writer.write(1, [])
    assert set(shards.finished(folder)) == {1}


def test_full_disk(folder):
    writer = shards.Writer(folder)
    writer.write(1, [detection(0.1)])
    size = writer.path.stat().st_size
    with files_of_at_most(size + 20), pytest.raises(UserError, match="what is finished is kept"):
        writer.write(2, [detection(0.2)])
    assert set(shards.finished(folder)) == {1}
    assert writer.path.stat().st_size == size + 20
    writer.close()
    shards.Writer(folder).write(2, [detection(0.2)])
    assert [each["score"] for each in shards.read(folder, [1, 2])] == [0.1, 0.2]


def test_a_foreign_file_is_named(folder):
    writer = shards.Writer(folder)
    writer.write(1, [])
    with open(writer.path, "ab") as file:
        file.write(b"something else\n")
    with pytest.raises(UserError, match=r"shard-0.jsonl, line 2: this is not the result of an image"):
        shards.finished(folder)
