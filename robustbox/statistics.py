"""Intervals and medians for results in which some images failed. Failures count; nothing averages over successes only.

`robustbox.survival` has what depends on the number of queries, `robustbox.comparisons` what compares two attacks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A number and the interval around it."""

    value: float
    low: float
    high: float


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share of `hits` in `n` trials; (0, 1) where there was no trial."""
    return _proportion(hits, n, confidence, "wilson")


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a share of `hits` in `n` trials, which never covers too seldom; (0, 1) for no trial.

    For rare events, as the false alarms of a detector; for shares of success `wilson` is narrower and covers well on average.
    """
    return _proportion(hits, n, confidence, "exact")


def _proportion(hits: int, n: int, confidence: float, method: str) -> tuple[float, float]:
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # here: importing scipy.stats costs more than all of robustbox

    interval = binomtest(hits, n).proportion_ci(confidence, method=method)
    return float(interval.low), float(interval.high)


def median(distances: ArrayLike) -> float:
    """The median, where inf stands for a failure (the mean of a number and inf is inf); NaN for no value at all."""
    values = np.sort(np.asarray(distances, dtype=float))
    if not len(values):
        return float("nan")
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return float(low if low == high else (low + high) / 2)


def median_interval(distances: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The median of numbers of at least 0, inf for a failure, with the interval between two of them.

    Which two is a matter of the binomial distribution alone (the sign test turned around), so that an end may be inf, and the
    interval covers the median of any population at least as often as it says. Of five numbers or fewer at 95 %: 0 to inf.
    """
    values = np.asarray(distances, dtype=float)
    if not len(values):
        return Estimate(float("nan"), 0.0, float("inf"))
    from scipy.stats import quantile_test

    ends = quantile_test(values, q=0, p=0.5).confidence_interval(confidence)
    low = 0.0 if np.isnan(ends.low) else float(ends.low)
    return Estimate(median(values), low, float("inf") if np.isnan(ends.high) else float(ends.high))
