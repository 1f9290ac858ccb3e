"""Intervals and medians for results in which some images failed. Failures count; nothing averages over successes only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share of `hits` in `n` trials; (0, 1) where there was no trial."""
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # here: importing scipy.stats costs more than all of robustbox

    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def median(distances: ArrayLike) -> float:
    """The median, where inf stands for a failure (the mean of a number and inf is inf); NaN for no value at all."""
    values = np.sort(np.asarray(distances, dtype=float))
    if not len(values):
        return float("nan")
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return float(low if low == high else (low + high) / 2)
