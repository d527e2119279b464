"""Figures against pycocotools, the bootstrap against cases with a known answer."""

import contextlib
import copy
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dk_detection.errors import UserError
from dk_detection.evaluation.average_precision import (
    BACKENDS,
    FIGURES,
    Evaluation,
    compare,
    draw,
    intervals,
    resampled_figures,
)
from tests.evaluation.made_up import detections, truth, without


def pycocotools_figures(content: dict, results: list[dict], kind: str) -> list[float]:
    """The figures that pycocotools itself prints."""
    content, results = copy.deepcopy((content, results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        comparison = COCOeval(coco, coco.loadRes(without(results, "bbox") if kind == "segm" else results), kind)
        comparison.evaluate()
        comparison.accumulate()
        comparison.summarize()
    return [100 * value if value > -1 else math.nan for value in comparison.stats[:6]]


@pytest.fixture(scope="module")
def content():
    return truth(14, np.random.default_rng(0))


@pytest.fixture(scope="module")
def results(content):
    return detections(content, np.random.default_rng(1))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools(content, results, kind):
    before = copy.deepcopy((content["annotations"], results))
    evaluation = Evaluation(copy.deepcopy(content), results, kind)
    expected = pycocotools_figures(content, results, kind)
    assert list(evaluation.figures().values()) == expected
    assert not np.isnan(expected).any() and min(expected) > 0
    assert (content["annotations"], results) == before
    for name, figures in evaluation.per_category().items():
        ids = [category["id"] for category in content["categories"] if category["name"] == name]
        one = dict(content, categories=[category for category in content["categories"] if category["id"] in ids])
        one["annotations"] = [each for each in content["annotations"] if each["category_id"] in ids]
        np.testing.assert_array_equal(
            list(figures.values()), pycocotools_figures(one, [e for e in results if e["category_id"] in ids], kind)
        )


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_hotcoco_gives_the_same_bits(content, results, kind):
    pytest.importorskip("hotcoco", reason="the optional library is not installed")
    ours, theirs = (Evaluation(copy.deepcopy(content), results, kind, backend) for backend in BACKENDS)
    assert ours.figures() == theirs.figures()
    weights = draw(ours.num_images, 3)
    np.testing.assert_array_equal(ours.resample(weights), theirs.resample(weights))


def repeated(content: dict, results: list[dict], weights: np.ndarray) -> tuple[dict, list[dict]]:
    """A data set in which images really occur several times, with the detections on them."""
    images, annotations, found = [], [], []
    for image, weight in zip(content["images"], weights, strict=True):
        for _ in range(weight):
            new = len(images)
            images.append(dict(image, id=new))
            for each in content["annotations"]:
                if each["image_id"] == image["id"]:
                    annotations.append(dict(copy.deepcopy(each), id=len(annotations) + 1, image_id=new))
            found += [dict(each, image_id=new) for each in results if each["image_id"] == image["id"]]
    return dict(content, images=images, annotations=annotations), found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_resample_is_exactly_a_data_set_with_repeated_images(content, results, kind):
    evaluation = Evaluation(copy.deepcopy(content), results, kind)
    weights = np.concatenate([np.ones((1, evaluation.num_images), int), draw(evaluation.num_images, 4, seed=3)])
    got = evaluation.resample(weights)
    np.testing.assert_allclose(got[0], list(evaluation.figures().values()), rtol=1e-12)
    for row, weight in zip(got[1:], weights[1:], strict=True):
        np.testing.assert_allclose(row, pycocotools_figures(*repeated(content, results, weight), kind), rtol=1e-12)


def test_resamples_are_computed_in_parts(content, results, monkeypatch):
    evaluation = Evaluation(copy.deepcopy(content), results, "bbox")
    weights = draw(evaluation.num_images, 7)
    whole = evaluation.resample(weights)
    monkeypatch.setattr("dk_detection.evaluation.average_precision._MAX_CELLS", 90)
    np.testing.assert_array_equal(evaluation.resample(weights), whole)


def one_object_each(num_images: int, found: list[int]) -> tuple[dict, list[dict]]:
    """Images with one object of medium size, exactly found in some of them and not looked for in the others."""
    box = [10.0, 10.0, 50.0, 50.0]
    content = dict(
        images=[dict(id=i, height=100, width=100) for i in range(num_images)],
        annotations=[
            dict(id=i + 1, image_id=i, category_id=1, bbox=box, area=2500.0, iscrowd=0) for i in range(num_images)
        ],
        categories=[dict(id=1, name="box")],
    )
    return content, [dict(image_id=i, category_id=1, bbox=box, score=0.9) for i in found]


def test_interval_of_a_share_is_the_binomial_one():
    """Precision is 1 up to the share of objects that is found: AP is that share, and a resample's is binomial."""
    number, found = 150, 96
    evaluation = Evaluation(*one_object_each(number, list(range(found))), "bbox")
    share = found / number
    probabilities = np.array([math.comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(number + 1)])
    # AP has 101 steps: with k objects found the recall thresholds up to k / number are reached.
    values = np.array([100 * (math.floor(100 * k / number + 1e-9) + 1) / 101 for k in range(number + 1)])
    assert evaluation.figures()["AP"] == pytest.approx(values[found])

    raw = evaluation.resample(draw(number, 4000, seed=1))[:, 0]
    assert set(raw.round(6)) <= set(values.round(6))
    mean = probabilities @ values
    deviation = math.sqrt(probabilities @ (values - mean) ** 2)
    assert raw.mean() == pytest.approx(mean, abs=4 * deviation / math.sqrt(4000))
    assert raw.std() == pytest.approx(deviation, rel=0.05)
    resampled = resampled_figures(evaluation, 4000, seed=1)
    assert resampled[:, 0].mean() == pytest.approx(evaluation.figures()["AP"])
    cumulative = probabilities.cumsum()
    expected = [values[np.searchsorted(cumulative, tail)] - mean + values[found] for tail in (0.025, 0.975)]
    assert intervals(resampled)["AP"] == pytest.approx(expected, abs=1.0)  # a step of AP


def test_what_is_undefined_stays_so():
    evaluation = Evaluation(*one_object_each(5, [0, 1]), "bbox")
    assert [name for name, value in evaluation.figures().items() if math.isnan(value)] == ["S", "L"]
    resampled = resampled_figures(evaluation, 20)
    assert np.isnan(resampled[:, [3, 5]]).all() and not np.isnan(resampled[:, [0, 1, 2, 4]]).any()
    assert math.isnan(intervals(resampled)["L"][0])
    difference = compare(evaluation, evaluation, 20)["L"]
    assert math.isnan(difference.value) and math.isnan(difference.certainty) and difference.p_value == 1


def test_comparison_of_a_detector_with_itself(content, results):
    evaluation = Evaluation(copy.deepcopy(content), results, "bbox")
    for difference in compare(evaluation, evaluation, 50).values():
        assert (difference.value, difference.interval) == (0, (0, 0))
        assert (difference.certainty, difference.p_value) == (0.5, 1)


def test_comparison_is_paired():
    """B finds 14 objects that A does not, A finds 4 that B does not, both find 60: only the 18 matter."""
    number, both, only_a, only_b = 200, 60, 4, 14
    data, results_a = one_object_each(number, list(range(both + only_a)))
    _, results_b = one_object_each(number, list(range(both)) + list(range(both + only_a, both + only_a + only_b)))
    a, b = Evaluation(data, results_a, "bbox"), Evaluation(data, results_b, "bbox")
    difference = compare(a, b, 3000)["AP50"]
    assert difference.value == pytest.approx(100 * 10 / 202, abs=0.6)
    share = (only_b - only_a) / number
    deviation = 100 * math.sqrt(((only_a + only_b) / number - share**2) / number)
    low, high = difference.interval
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.1)
    # A normal distribution with this mean and deviation is below 0 with this probability.
    behind = 0.5 * math.erfc(difference.value / deviation / math.sqrt(2))
    assert difference.certainty == pytest.approx(1 - behind, abs=0.01)
    assert difference.p_value == pytest.approx(2 * behind, abs=0.02)
    other_way = compare(b, a, 3000)["AP50"]
    assert other_way.value == -difference.value and other_way.certainty == pytest.approx(1 - difference.certainty)


def test_certain_comparison():
    content, results = one_object_each(30, list(range(30)))
    worse = Evaluation(content, results[:10], "bbox")
    difference = compare(worse, Evaluation(content, results, "bbox"), 99)["AP"]
    assert difference.certainty == 1 and difference.p_value == pytest.approx(2 / 100)


def test_bad_input(content, results, monkeypatch):
    with pytest.raises(UserError, match="no detection"):
        Evaluation(content, [], "bbox")
    monkeypatch.setitem(__import__("sys").modules, "hotcoco", None)
    with pytest.raises(UserError, match=r"hotcoco is not installed .*dk-detection\[evaluation\]"):
        Evaluation(content, results, "bbox", "hotcoco")
    other = Evaluation(*one_object_each(3, [0]), "bbox")
    with pytest.raises(ValueError, match="a has 14 images and b 3"):
        compare(Evaluation(copy.deepcopy(content), results, "bbox"), other)
    assert tuple(other.figures()) == FIGURES
