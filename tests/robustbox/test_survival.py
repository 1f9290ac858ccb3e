from __future__ import annotations

import numpy as np
import pytest

from robustbox.statistics import wilson
from robustbox.survival import followed, median_curve, median_queries, success_curve


def test_without_censoring_the_curve_is_the_share_and_its_band_wilsons() -> None:
    first = np.array([3, 3, 7, 0, 50, 0, 1, 8, 9, 100])
    curve = success_curve(first, 100)
    for queries in (0, 1, 2, 3, 10, 60, 100):
        hits = int(((first > 0) & (first <= queries)).sum())
        low, high = wilson(hits, 10)
        assert curve.at(queries) == (
            pytest.approx(hits / 10),
            pytest.approx(low, abs=1e-12),
            pytest.approx(high, abs=1e-12),
        )


def test_with_censoring_it_is_kaplan_and_meiers_estimate() -> None:
    # Freireich et al. 1963, weeks in remission under 6-MP: the textbook example; S(10) = 0.753, S(23) = 0.448.
    weeks = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    event = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    curve = success_curve(np.array(weeks) * np.array(event), weeks)
    known = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    assert {week: round(1 - curve.at(week).value, 3) for week in known} == known
    # Greenwood's standard error at 23 weeks is 0.1346: the band is Wilson's for 0.448 * 0.552 / 0.1346^2 = 13.65 images.
    value, low, high = curve.at(23)
    n, z = value * (1 - value) / 0.1346**2, 1.959964
    for end in (low, high):  # Wilson's ends solve this equation
        assert (end - value) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, rel=2e-3)
    assert median_queries(curve).value == 23


def test_the_bands_edges_are_never_certain() -> None:
    nothing = success_curve(np.zeros(10), 100)
    assert nothing.at(100) == (0.0, 0.0, pytest.approx(wilson(0, 10)[1]))
    assert median_queries(nothing) == (np.inf, np.inf, np.inf)
    everything = success_curve(np.arange(1, 11), 100)
    assert everything.at(100) == (1.0, pytest.approx(wilson(10, 10)[0]), 1.0)
    assert median_queries(everything) == (5, 2, 9)  # by Wilson: 2 of 10 may be half, 8 may still not be, 9 must
    assert np.isnan(success_curve([], 100).at(10).value)


def test_who_gives_up_is_no_survivor_of_unknown_fate() -> None:
    reasons = ["success", "finished", "banned", "error", "budget", "total-budget", "stopped"]
    assert followed(reasons, [7, 10, 20, 30, 100, 40, 50], 100).tolist() == [100, 100, 100, 100, 100, 40, 50]
    gave_up = success_curve([50, 0, 0, 0], followed(["success", *["finished"] * 3], [50, 5, 5, 5], 100))
    assert gave_up.at(100).value == 0.25
    cut_off = success_curve([50, 0, 0, 0], followed(["success", *["stopped"] * 3], [50, 5, 5, 5], 100))
    assert cut_off.at(100).value == 1.0


@pytest.mark.parametrize("censored", [False, True])
def test_the_band_of_success_covers_the_truth(censored: bool) -> None:
    generator = np.random.default_rng(1)
    runs, covered = 300, np.zeros(3)
    points = np.array([30, 100, 200])
    truth = 1 - np.exp(-points / 120)
    for _ in range(runs):
        when = np.ceil(generator.exponential(120, size=40))
        ends = generator.integers(20, 301, size=40) if censored else np.full(40, 300)
        curve = success_curve(np.where(when <= ends, when, 0), ends)
        covered += [low <= p <= high for (_, low, high), p in zip(map(curve.at, points), truth, strict=True)]
    assert ((covered / runs >= 0.91) & (covered / runs <= 0.99)).all(), covered / runs


def test_median_distances_fall_from_infinity() -> None:
    distances = np.vstack([np.full(8, np.inf), [*range(1, 6), *[np.inf] * 3], range(1, 9)])
    curve = median_curve(distances, [10, 20, 30])
    assert curve.value.tolist() == [np.inf, 4.5, 4.5]
    assert curve.low.tolist() == [np.inf, 1.0, 1.0]
    assert curve.high.tolist() == [np.inf, np.inf, 8.0]
    assert curve.at(25).value == 4.5
    with pytest.raises(ValueError, match="begins at 10"):
        curve.at(9)
