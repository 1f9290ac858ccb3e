"""The books of one image, kept by the query loop: the attack has no say in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from robustbox.identity import derive_seed

StopReason = Literal["success", "budget", "total-budget", "banned", "finished", "error", "stopped", "misclassified", ""]

TOLERANCE = 1e-6
"""Slack of `distance <= epsilon`, absolute and relative: what rounding to float32 may add to a row on the sphere."""


def inside(distance: float, epsilon: float | None) -> bool:
    """Whether a distance lies in the ball of radius epsilon (None: everywhere that is finite)."""
    return distance < np.inf if epsilon is None else distance <= epsilon * (1 + TOLERANCE) + TOLERANCE


Noticed = tuple[int, int]
"""Rows that looked like an attack, and which of its account's own rows was the first (from 1; 0: none)."""


def together(found: Iterable[Noticed | None]) -> Noticed | None:
    """What was noticed of several accounts, or by several gates: the sum, and the earliest; None where nobody watched."""
    known = [each for each in found if each is not None]
    if not known:
        return None
    return sum(hits for hits, _ in known), min((first for _, first in known if first), default=0)


@dataclass(slots=True)
class Record:
    """What happened to one image.

    Attributes:
        account: the attacker's first account; int64.
        budget: rows that may be charged.
        accounts: accounts that the attacker may open, the first one included; None is any number.
        spent: rows charged so far.
        best: the nearest row that was really sent and really answered adversarially, [C,H,W], or None.
        distance: its distance; inf where there is none.
        lucky: the least distance at which any answer was adversarial; less than `distance` where it was outvoted.
        trace: (query, distance) at every improvement; queries count from 1.
        refusals: queries that a gate rejected or no longer served, as runs (first, last) that count from 1.
        burnt: accounts that a gate banned.
        stop: why the attack ended.
        error: the message of the exception that ended it, if one did.
    """

    account: int
    budget: int
    accounts: int | None = 1
    spent: int = 0
    best: Tensor | None = None
    distance: float = np.inf
    lucky: float = np.inf
    trace: list[tuple[int, float]] = field(default_factory=list)
    refusals: list[tuple[int, int]] = field(default_factory=list)
    burnt: int = 0
    stop: StopReason = ""
    error: str | None = None
    _opened: int = 0
    _in_use: dict[int, int] = field(default_factory=dict)

    @property
    def senders(self) -> list[int]:
        """The accounts that the attacker has opened, the first one always among them."""
        return [self._nth(k) for k in range(max(self._opened, 1))]

    def _nth(self, k: int) -> int:
        return derive_seed(self.account, k) if k else self.account

    def refuse(self, queries: list[int]) -> None:
        """Note which queries, counted from 1 and ascending, were refused."""
        for query in queries:
            if self.refusals and self.refusals[-1][1] == query - 1:
                self.refusals[-1] = (self.refusals[-1][0], query)
            else:
                self.refusals.append((query, query))

    @property
    def unopened(self) -> int | None:
        """Accounts that the attacker may still open, beside the one in use; None is any number."""
        return None if self.accounts is None else max(self.accounts - max(self._opened, 1), 0)

    def sender(self, which: int) -> int:
        """The account that sends a query (`Query.account`), opened where it is new or the last one was banned.

        Raises:
            ValueError: the attacker has opened all that it may.
        """
        if which not in self._in_use:
            if self.accounts is not None and self._opened >= self.accounts:
                raise ValueError(
                    f"the attack asked for account {which}, but has opened all {self.accounts} it may have"
                )
            self._in_use[which] = self._nth(self._opened)
            self._opened += 1
        return self._in_use[which]

    def ban(self, which: int) -> None:
        """Note that the account which sent a query is no longer served."""
        del self._in_use[which]
        self.burnt += 1

    def overrule(self) -> None:
        """Forget the best row: it did not hold when it was asked again."""
        self.best, self.distance = None, np.inf
        self.trace.clear()
