"""QPA without learning: who descends from whom, and which family is too alike to be chance.

After "Query Provenance Analysis: Efficient and Robust Defense against Query-based Black-box Attacks" (S&P 2025): each query is
linked to the earlier one that it resembles most, if that is more than benign queries do; an attack's queries then make one
large component, even where an adaptive attacker (OARS) keeps each pair below a threshold of Blacklight's. The paper scores
components by a network over their graphs; here a test of the same evidence decides, so that nothing is trained.

    m_i  = the most hashes that the i-th query's Blacklight fingerprint shares with one of the N before it
    p_i  = min(1, N p(m_i))           p(m): how often two unrelated images share at least m of 50 hashes, measured
    link   where p_i <= `link`        (the paper: the 90th percentile of benign queries; here the 99th)
    alert  where a component of at least `smallest` queries has Fisher's combined probability of its n links,
           P(Gamma(n) >= sum -ln p_i), of at most alpha / N
    hit    where a query links to a component that has an alert, or makes it so

p(m) was measured on CIFAR-10 test images by scripts/bench_gates.py (part `pairs`), and is used for other images too.

Deviations: Fisher's test instead of Grubbs' outlier test and the graph network; similarity is Blacklight's with its salt; a
stricter link, since unrelated images with one background are alike in families too (docs/stateful.md).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaincc
from torch import Tensor

from .blacklight import Blacklight, Secret
from .gate import Shape, StatefulDefense
from .index import SketchIndex, Tokens
from .memory import IndexedMemory, Memory, Verdict
from .table import RowTable

# fmt: off
UNRELATED = (1.0, 4e-3, 9.7e-4, 4.5e-4, 2.4e-4, 1.3e-4, 7.4e-5, 4.4e-5, 2.8e-5, 1.8e-5, 1.2e-5, 7.9e-6, 4.9e-6, 3.1e-6, 2e-6)
# fmt: on
"""p(m) for m = 0, 1, ...: the share of pairs of CIFAR-10 images with at least m matches of 50; falls on by `_FALL`."""
_FALL = 0.6
CERTAIN = 26
"""Matches (Blacklight's own hit) at which the search for a still nearer predecessor ends: no chance makes so many."""


@dataclass(frozen=True, kw_only=True)
class QPA(StatefulDefense):
    """Query provenance (after QPA, 2025): refuses queries of a family whose likenesses are no chance.

    Args:
        link: how improbable a query's likeness to its nearest predecessor must be among benign queries to be linked to it.
        alpha: probability of a false alert, over all queries of a history, if benign queries are unrelated.
        smallest: queries that a family needs for an alert: 3 lets everybody send a picture twice.
    """

    name: ClassVar[str] = "qpa"

    link: float = 0.01
    alpha: float = 0.01
    smallest: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.link <= 1, f"link must be in (0, 1], not {self.link}")
        self.require(0 < self.alpha < 1, f"alpha must be between 0 and 1, not {self.alpha}")
        self.require(self.smallest >= 2, f"smallest must be at least 2, not {self.smallest}")

    def check_shape(self, shape: Shape) -> None:
        Blacklight().check_shape(shape)

    def secret(self, shape: Shape, generator: torch.Generator) -> Secret:
        return Blacklight().secret(shape, generator)

    def prints(self, rows: Tensor, secrets: Sequence[Secret]) -> list[Tokens]:
        """Blacklight's sketches."""
        return Blacklight().prints(rows, secrets)

    def memory(self, secret: Secret) -> Memory:
        return FamilyMemory(self.link, self.alpha, self.smallest)


@dataclass(slots=True)
class Family:
    """A component: how many queries it has, the evidence of its links, and whether it is a known attack."""

    queries: int = 1
    evidence: float = 0.0
    alert: bool = False


class FamilyMemory(IndexedMemory):
    """Sketches, each linked to the one before it that it resembles most: families are trees and never merge."""

    def __init__(self, link: float, alpha: float, smallest: int) -> None:
        self._link, self._alpha, self._smallest = link, alpha, smallest
        self._index: SketchIndex = SketchIndex()
        self._families: RowTable[NDArray[np.object_]] = RowTable(lambda rows: np.empty(rows, dtype=np.object_))

    def judge(self, print: Tokens) -> Verdict:
        matches, row = self._index.best(print, CERTAIN)
        family = self._joined(matches, row)
        return Verdict(family is not None and family.alert, row, matches)

    def store(self, print: Tokens, verdict: Verdict) -> int:
        family = self._joined(verdict.likeness, verdict.match)
        if family is not None:
            former: Family = self._families.at(verdict.match)
            former.queries, former.evidence, former.alert = family.queries, family.evidence, family.alert
            family = former
        self._families.add(family or Family())
        return self._index.add(print)

    def forget(self, before: int) -> None:
        super().forget(before)
        self._families.forget(before)

    @property
    def nbytes(self) -> int:
        families = {id(family): family for family in self._families.since(self._families.first)}
        sizes = (sys.getsizeof(family) + sys.getsizeof(family.evidence) for family in families.values())
        return self._index.nbytes + self._families.nbytes + sum(sizes)

    def _joined(self, matches: int, row: int) -> Family | None:
        """The family of a stored row with one query more, or None where the likeness is not enough to link to it."""
        rows = len(self._index)
        chance = min(1.0, rows * unrelated(matches))
        if row < 0 or chance > self._link:
            return None
        family: Family = self._families.at(row)
        queries, evidence = family.queries + 1, family.evidence - math.log(chance)
        alert = family.alert or (
            queries >= self._smallest and float(gammaincc(queries - 1, evidence)) <= self._alpha / rows
        )
        return Family(queries, evidence, alert)


def unrelated(matches: int) -> float:
    """p(m), the share of unrelated pairs with at least m matches."""
    last = len(UNRELATED) - 1
    return UNRELATED[min(matches, last)] * _FALL ** max(0, matches - last)
