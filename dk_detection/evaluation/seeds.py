"""Statistics of runs that differ in their seed: how sure a mean is, and whether two kinds of run differ.

All of this speaks of other seeds of the same training on the same data, of no other data. It needs SciPy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean and the half width of its confidence interval (Student's t), NaN where there is only one value."""

    value: float
    margin: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        values = np.asarray(values, dtype=float)
        if values.ndim != 1 or not values.size or not np.isfinite(values).all():
            raise ValueError(f"Mean: values must be finite numbers, at least one, got {values.tolist()}")
        if len(values) == 1:
            return cls(float(values[0]), math.nan)
        width = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
        return cls(float(values.mean()), float(width * values.std(ddof=1) / math.sqrt(len(values))))


@dataclass(frozen=True)
class Difference:
    """How one kind of run differs from another over the same seeds.

    Attributes:
        mean: The mean difference and its interval.
        seeds: Number of pairs.
        ahead: Number of pairs in which the difference is above zero.
        t: Two-sided p-value of the paired t-test: it takes the differences as normally distributed.
        wilcoxon: That of Wilcoxon's signed-rank test: it takes them as symmetric only. With n pairs it is never below
            2 / 2^n.
    """

    mean: Mean
    seeds: int
    ahead: int
    t: float
    wilcoxon: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> "Difference":
        """`after` less `before`, pair by pair; at least two pairs."""
        if len(before) != len(after) or len(before) < 2:
            raise ValueError(f"Difference: at least two pairs are needed, got {len(before)} and {len(after)} values")
        differences = np.subtract(after, before)
        if np.ptp(differences) == 0:  # no spread to measure by
            p_t = 1.0 if differences[0] == 0 else 0.0
        else:
            p_t = float(stats.ttest_rel(after, before).pvalue)
        p_wilcoxon = 1.0 if not differences.any() else float(stats.wilcoxon(differences).pvalue)
        return cls(Mean.of(differences), len(differences), int((differences > 0).sum()), p_t, p_wilcoxon)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, 1979).

    The chance that any of those below a bound is there by accident is at most that bound.
    """
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
