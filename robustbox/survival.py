"""What an attack has reached after so many queries: success as a survival curve with censoring, and median distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustbox.statistics import Estimate, median_interval

Floats = NDArray[np.float64]
CUT_SHORT = ("total-budget", "stopped")
"""Stop reasons for which nobody knows what the image's own budget would have brought."""


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Estimates with pointwise bands, at numbers of queries.

    Attributes:
        queries: [n], ascending. Between two of them the estimate is that of the one before.
        value, low, high: [n].
    """

    queries: Floats
    value: Floats
    low: Floats
    high: Floats

    def at(self, queries: float) -> Estimate:
        """The estimate after so many queries."""
        position = int(np.searchsorted(self.queries, queries, side="right")) - 1
        if position < 0:
            raise ValueError(f"the curve begins at {self.queries[0]:g} queries")
        return Estimate(float(self.value[position]), float(self.low[position]), float(self.high[position]))


def followed(stop_reasons: Sequence[str], queries: ArrayLike, budget: int) -> Floats:
    """How many queries each image was followed for, [N]: all of its budget, also where the attack gave up or was banned before.

    An attack that ended of its own accord would not have succeeded with more queries. Only a run that ended from outside leaves
    that open.
    """
    cut = np.isin(np.asarray(stop_reasons), CUT_SHORT)
    return np.where(cut, np.asarray(queries, dtype=float), float(budget))


def success_curve(first_success: ArrayLike, until: ArrayLike, confidence: float = 0.95) -> Curve:
    """The share of images broken within q queries, from 0 to the longest that any image was followed (Kaplan-Meier).

    An image counts as at risk until it is broken or no longer followed. The band is Wilson's at the effective number of images
    S(1-S) / Greenwood's variance (Rothman 1978); without censoring that is the number of images, and the band theirs. It holds
    for each q by itself, not for the curve as a whole.

    Args:
        first_success: the query, counted from 1, that first succeeded on each of N images; 0 for none.
        until: how many queries each image was followed for (`followed`), N numbers or one for all.
        confidence: of the band.
    """
    first = np.asarray(first_success, dtype=float)
    ends = np.broadcast_to(np.asarray(until, dtype=float), first.shape)
    if not len(first):
        return Curve(np.zeros(1), np.full(1, np.nan), np.zeros(1), np.ones(1))
    from scipy.stats import CensoredData, ecdf

    broken = first > 0
    survival = ecdf(CensoredData(uncensored=first[broken], right=ends[~broken])).sf
    times = np.concatenate(([0.0], survival.quantiles))
    intact = np.concatenate(([1.0], survival.probabilities))
    exits = np.sort(np.where(broken, first, ends))
    at_risk = len(first) - np.searchsorted(exits, times, side="left")
    deaths = np.array([(first[broken] == time).sum() for time in times])
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.cumsum(np.where(deaths > 0, deaths / (at_risk * (at_risk - deaths)), 0.0))
        effective = (1 - intact) / (intact * greenwood)
    # Where nobody is broken yet, or nobody is left, the variance is 0: as many images stand behind that as are at risk.
    effective = np.where(
        np.isfinite(effective), effective, np.where(intact == 1, at_risk, _last(effective, len(first)))
    )
    low, high = _wilson(1 - intact, effective, confidence)
    return Curve(times, 1 - intact, low, high)


def median_queries(curve: Curve) -> Estimate:
    """Queries after which half of the images are broken, inf where that never happened, with the band turned sideways."""
    return Estimate(_reaches(curve, curve.value), _reaches(curve, curve.high), _reaches(curve, curve.low))


def median_curve(distances: ArrayLike, queries: Sequence[int], confidence: float = 0.95) -> Curve:
    """The median of the least distances found within so many queries, failures being inf, with `median_interval`'s bands.

    Args:
        distances: [len(queries), N], a row for each number of queries (`AttackResult.distance_at`), of the attacked images.
        queries: ascending numbers of queries.
        confidence: of the bands, each for itself.
    """
    estimates = np.array([median_interval(row, confidence) for row in np.asarray(distances, dtype=float)]).reshape(
        -1, 3
    )
    return Curve(np.asarray(queries, dtype=float), *estimates.T)


def _last(values: Floats, otherwise: float) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else otherwise


def _wilson(share: Floats, n: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Wilson's interval, for numbers of trials that need not be whole."""
    from scipy.special import ndtri

    z2 = float(ndtri(0.5 + confidence / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def _reaches(curve: Curve, values: Floats) -> float:
    there = np.flatnonzero(values >= 0.5)
    return float(curve.queries[there[0]]) if len(there) else float("inf")
