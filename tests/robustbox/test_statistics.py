from __future__ import annotations

import math

import numpy as np
import pytest

from robustbox.statistics import clopper_pearson, median, median_interval, wilson


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


def test_clopper_pearson_has_its_known_values_and_covers_at_least_as_often_as_it_says() -> None:
    assert clopper_pearson(0, 9000) == (0.0, pytest.approx(4.098e-4, rel=1e-3))  # the rule of three, made exact
    assert clopper_pearson(5, 10) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    for n, p in [(20, 0.5), (50, 0.02), (100, 0.1)]:
        weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        within = [low <= p <= high for low, high in (clopper_pearson(k, n) for k in range(n + 1))]
        assert sum(weight for weight, inside in zip(weights, within, strict=True) if inside) >= 0.95


def test_the_interval_of_a_median_stands_on_the_right_order_statistics() -> None:
    values = np.arange(1.0, 21.0)  # of 20 numbers: the 6th and the 15th, by any table of the sign test
    assert median_interval(values[::-1]) == (10.5, 6.0, 15.0)
    assert median_interval(np.where(values > 14, np.inf, values)) == (10.5, 6.0, np.inf)
    assert median_interval(np.where(values > 10, np.inf, values)) == (np.inf, 6.0, np.inf)
    assert median_interval(np.full(20, np.inf)) == (np.inf, np.inf, np.inf)
    assert median_interval(values[:5]) == (3.0, 0.0, np.inf)
    assert median_interval(values[:6]) == (3.5, 1.0, 6.0)
    assert median_interval([])[1:] == (0.0, np.inf)


def test_the_interval_of_a_median_covers_it_also_where_many_fail() -> None:
    generator = np.random.default_rng(0)
    truth, covered, runs = math.log(2) / 0.8, 0, 400  # an exponential law of rate 0.8; what exceeds 1.2 has failed
    for _ in range(runs):
        found = generator.exponential(1 / 0.8, size=25)
        estimate = median_interval(np.where(found > 1.2, np.inf, found))
        covered += estimate.low <= truth <= estimate.high
    assert covered / runs >= 0.94
