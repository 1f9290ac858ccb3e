from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from robustbox.comparisons import Discordance, mcnemar, ratio_of_medians, sign_test, wilcoxon

INF, NAN = np.inf, np.nan


def test_mcnemar_asks_only_the_images_that_one_broke() -> None:
    first = np.repeat([True, True, False, False], [30, 8, 1, 5])
    second = np.repeat([True, False, True, False], [30, 8, 1, 5])
    assert mcnemar(first, second) == Discordance(8, 1, 35, pytest.approx(20 / 512))  # 2 (1 + 9) / 2^9
    assert mcnemar(second, first).p == mcnemar(first, second).p
    assert mcnemar(first, first).p == 1.0


def test_signs_count_failures_as_farthest() -> None:
    found = sign_test([1, 1, INF, INF, 2, 2, NAN, 3], [2, INF, 1, INF, 2, 5, 1, NAN])
    assert found == Discordance(3, 1, 2, pytest.approx(0.625))
    with pytest.raises(ValueError, match="paired image by image"):
        sign_test([1, 2], [1])


def test_wilcoxon_is_the_law_of_the_ranks_as_they_are() -> None:
    one, two = np.array([1.0, 2.0, 4.0, INF, 3.0, INF, 1.0]), np.array([1.5, 2.2, INF, 5.0, 9.0, INF, 1.0])
    ranks = np.array(
        [2, 1, 4.5, 4.5, 3]
    )  # two failures share the largest rank; both failed and both equal are left out
    observed = 4.5  # of the one pair in which the first did worse
    sums = [ranks[np.array(signs)].sum() for signs in itertools.product([False, True], repeat=5)]
    less = np.mean([total <= observed for total in sums])
    assert wilcoxon(one, two) == pytest.approx(2 * less)
    assert wilcoxon(one, one) == 1.0


def test_wilcoxon_agrees_with_scipy_where_nothing_failed() -> None:
    generator = np.random.default_rng(2)
    one, two = generator.lognormal(0, 0.5, 40), generator.lognormal(0.2, 0.5, 40)
    assert wilcoxon(one, two) == pytest.approx(stats.wilcoxon(np.log(one / two), method="exact").pvalue)


def test_wilcoxon_rejects_a_true_hypothesis_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    pairs = (generator.lognormal(0, 1, (2, 10)) for _ in range(400))
    p = [wilcoxon(np.where(one > 3, INF, one), np.where(two > 3, INF, two)) for one, two in pairs]
    assert np.mean(np.array(p) <= 0.05) <= 0.07


def test_the_ratio_of_medians_is_exact_about_infinities() -> None:
    found, lost = np.linspace(1, 2, 21), np.full(21, INF)
    assert ratio_of_medians(2 * found, found) == (2.0, pytest.approx(2, abs=0.5), pytest.approx(2, abs=0.7))
    assert ratio_of_medians(3 * found, 2 * found[::1]).value == 1.5
    assert ratio_of_medians(lost, found) == (INF, INF, INF)
    assert ratio_of_medians(found, lost) == (0.0, 0.0, 0.0)
    value, low, high = ratio_of_medians(lost, lost)
    assert np.isnan(value)
    assert (low, high) == (0.0, INF)
    half = np.where(np.arange(21) < 11, found, INF)  # the median is found, but only just
    value, low, high = ratio_of_medians(half, found)
    assert value == pytest.approx(1.0)
    assert (low, high) == (1.0, INF)
    assert ratio_of_medians([], [])[1:] == (0.0, INF)


def test_the_interval_of_the_ratio_covers_it() -> None:
    generator = np.random.default_rng(4)
    covered, runs, n = 0, 200, 40
    for _ in range(runs):
        image = generator.lognormal(0, 0.4, n)  # what both attacks share
        one, two = (image * generator.lognormal(shift, 0.3, n) for shift in (np.log(0.8), 0.0))
        _, low, high = ratio_of_medians(np.where(one > 2.5, INF, one), np.where(two > 2.5, INF, two), resamples=400)
        covered += low <= 0.8 <= high
    assert 0.9 <= covered / runs <= 1.0
