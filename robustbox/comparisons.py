"""Two attacks on the same images, image by image. What both found or both missed says nothing about which is better.

Distances are inf where an attack found nothing; NaN (an image that was not attacked) is left out. Only images that both were
tried on may be compared: match them by `sha256` first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustbox.statistics import Estimate, median

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Discordance:
    """On how many images each of two attacks did better, and the two-sided p-value of a difference that large by chance."""

    first: int
    second: int
    ties: int
    p: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> Discordance:
    """McNemar's exact test between two attacks' successes, bool [N]: the binomial test of the images that one alone broke."""
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    return _discordance(int((one & ~two).sum()), int((two & ~one).sum()), len(one))


def sign_test(first: ArrayLike, second: ArrayLike) -> Discordance:
    """The exact sign test between two attacks' distances, [N] each: on how many images each came nearer."""
    one, two = _paired(first, second)
    return _discordance(int((one < two).sum()), int((two < one).sum()), len(one))


def _discordance(one: int, two: int, n: int) -> Discordance:
    from scipy.stats import binomtest

    p = float(binomtest(one, one + two).pvalue) if one + two else 1.0
    return Discordance(one, two, n - one - two, p)


def wilcoxon(first: ArrayLike, second: ArrayLike) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test on the logarithms of two attacks' distances, [N] each.

    An image on which one of them failed has the largest rank of all; one on which both did, or both came as near, is left out.
    The law of the ranks is exact, ties included: every pattern of signs is as likely as any other.
    """
    one, two = _paired(first, second)
    differ = one != two
    if not differ.any():
        return 1.0
    from scipy.stats import rankdata

    with np.errstate(divide="ignore"):
        logs = np.log(one[differ]) - np.log(two[differ])
    twice = np.rint(2 * rankdata(np.abs(logs))).astype(int)  # tied ranks are halves
    law = np.ones(1)  # of twice the sum of the ranks with a positive sign
    for rank in twice:
        law = (np.pad(law, (0, rank)) + np.pad(law, (rank, 0))) / 2
    observed = int(twice[logs > 0].sum())
    return float(min(1.0, 2 * min(law[: observed + 1].sum(), law[observed:].sum())))


def ratio_of_medians(
    first: ArrayLike, second: ArrayLike, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Estimate:
    """The first attack's median distance over the second's, with a paired percentile bootstrap interval over images.

    0 where only the second's median is inf, inf where only the first's is, NaN where both are. A resample in which both are inf
    could be any ratio: it counts as 0 for the lower end and as inf for the upper.
    """
    one, two = _paired(first, second)
    if not len(one):
        return Estimate(float("nan"), 0.0, float("inf"))
    drawn = np.random.default_rng(seed).integers(len(one), size=(resamples, len(one)))
    ratios = _ratio(_medians(one[drawn]), _medians(two[drawn]))
    tail = (1 - confidence) / 2
    unknown = np.isnan(ratios)
    low = np.quantile(np.where(unknown, 0.0, ratios), tail, method="lower")
    high = np.quantile(np.where(unknown, np.inf, ratios), 1 - tail, method="higher")
    value = _ratio(np.array(median(one)), np.array(median(two)))
    return Estimate(float(value), float(low), float(high))


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != two.shape:
        raise ValueError(f"the attacks must be paired image by image, not {one.shape} with {two.shape}")
    asked = ~(np.isnan(one) | np.isnan(two))
    return one[asked], two[asked]


def _medians(values: Floats) -> Floats:
    """The median of each row; `np.median` would make NaN of infinities."""
    ordered = np.sort(values, axis=1)
    n = values.shape[1]
    low, high = ordered[:, (n - 1) // 2], ordered[:, n // 2]
    return np.where(low == high, low, (low + high) / 2)


def _ratio(one: Floats, two: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isinf(two), np.where(np.isinf(one), np.nan, 0.0), one / two)
