"""Means and differences over seeds, beside figures worked out by hand."""

import math

import pytest

from dk_detection.evaluation.seeds import Difference, Mean, holm


def test_mean():
    mean = Mean.of([1, 2, 3, 4, 5])
    assert mean.value == 3
    assert mean.margin == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)  # t at 0.975, 4 degrees


def test_one_value_has_no_interval():
    mean = Mean.of([7])
    assert mean.value == 7 and math.isnan(mean.margin)


@pytest.mark.parametrize("values", [[], [1, math.nan], [[1, 2]]])
def test_values_are_checked(values):
    with pytest.raises(ValueError, match="Mean: values must be finite"):
        Mean.of(values)


def test_difference():
    difference = Difference.of([10, 20, 30, 40], [11, 23, 32, 42])  # 1, 3, 2, 2: mean 2, deviation sqrt(2 / 3)
    assert (difference.mean.value, difference.seeds, difference.ahead) == (2, 4, 4)
    t = 2 / (math.sqrt(2 / 3) / 2)
    # The survival function of Student's t with 3 degrees of freedom, in closed form.
    angle = math.atan(t / math.sqrt(3))
    p = 1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle))
    assert difference.t == pytest.approx(p, rel=1e-6)
    assert difference.mean.margin == pytest.approx(3.182446 * math.sqrt(2 / 3) / 2, rel=1e-6)


def test_wilcoxon_counts_signs():
    before = [0.0] * 10
    assert Difference.of(before, [0.1 * i for i in range(1, 11)]).wilcoxon == pytest.approx(2 / 2**10)


@pytest.mark.parametrize(("step", "p"), [(0, 1), (1, 0)])
def test_differences_without_spread(step, p):
    difference = Difference.of([1, 2, 3], [1 + step, 2 + step, 3 + step])
    assert difference.t == p and difference.mean.value == step and difference.mean.margin == 0


@pytest.mark.parametrize(("before", "after"), [([1], [2]), ([1, 2], [1, 2, 3])])
def test_pairs_are_checked(before, after):
    with pytest.raises(ValueError, match="at least two pairs"):
        Difference.of(before, after)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []
