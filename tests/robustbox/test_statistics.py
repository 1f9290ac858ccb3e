from __future__ import annotations

import math

import numpy as np
import pytest

from robustbox.statistics import median, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval_has_its_known_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(("n", "p"), [(20, 0.5), (50, 0.9), (100, 0.1)])
def test_wilson_interval_covers_the_truth_about_as_often_as_it_says(n: int, p: float) -> None:
    k = np.arange(n + 1)
    weights = np.array([math.comb(n, int(i)) * p**i * (1 - p) ** (n - i) for i in k])
    covered = np.array([low <= p <= high for low, high in (wilson(int(i), n) for i in k)])
    assert 0.92 <= weights[covered].sum() <= 0.98


def test_median_counts_failures_as_infinity() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([1.0, 2.0, 3.0, 4.0]) == 2.5
    assert median([1.0, np.inf, np.inf]) == np.inf
    assert median([1.0, 2.0, np.inf, np.inf]) == np.inf
    assert median([np.inf, np.inf]) == np.inf
    assert math.isnan(median([]))
