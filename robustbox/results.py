"""What a run found, image by image, and how it is summed up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustbox.records import inside
from robustbox.statistics import median, wilson

MILESTONES = (50, 100, 250, 500, 1000, 2000, 5000, 10000, 20000, 50000)
"""Query numbers at which summaries take the median distance, as far as the budget reaches."""

REPLAYS = (10, 100)
"""Numbers of replays at which results state the risk that one of them is answered wrongly."""


@dataclass(frozen=True, slots=True, eq=False)
class AttackResult:
    """The outcome of one attack on N images.

    Attributes:
        success: bool [N], the headline: `success_fresh` where the black box is stochastic, else `success_any`. Always False for
            images that were misclassified before the attack.
        distance: float64 [N], from the image to its adversarial, recomputed on the very row that was sent; NaN without one.
        queries: int64 [N], rows charged to the attacker (start search, estimates, line searches, calibration: all of them).
        first_success: int64 [N], the query (counted from 1) that first reached the goal within epsilon; 0 = none did.
        adversarials: float32 [N,C,H,W] on the black box's device, really sent and really answered so; NaN where none.
        ledger: rows by phase; their sum is every row that the black box (or the undefended model) saw.
        clean_correct: bool [N], classified correctly before the attack.
        success_any: bool [N], some query reached the goal within epsilon, if only once.
        success_fresh: bool [N], the adversarial reached the goal again when the evaluator asked: in the majority of 25 draws
            where the black box is stochastic, else in one.
        success_clean: bool [N], the adversarial reached the goal with the noise off: without the defenses that answer at random
            (the same as fresh where none does, or where the model itself does).
        success_undefended: bool [N], the adversarial also fools the undefended model (the same as fresh without a defense).
        fresh_draws: int64 [N], how often the evaluator asked the full pipeline for the adversarial; 0 without one.
        fresh_fooled: int64 [N], in how many of these answers it reached the goal.
        refusals: queries that a stateful gate refused, as runs (first, last), counted from 1; charged like the others.
        accounts_burnt: int64 [N], accounts of the attacker that a gate banned.
        hits: rows that a gate of this process took for an attack, refused or, by one that is silent or gives decoys, answered;
            None where there is no gate, or none that can be asked.
        first_hits: which of its account's own rows was the first (from 1), the least over accounts; 0: none, None: as `hits`.
        stop_reasons: `success`, `budget`, `total-budget`, `banned` (the last account was), `finished` (the attack had no more
            to ask), `error`, `stopped` (the run ended early) or `misclassified`.
        errors: what an attack that raised had to say.
        traces: (query, distance) at every improvement.
        epsilon: the radius asked for, or None.
        meta: what was run on what, by whom and with which versions: plain JSON values.
    """

    success: NDArray[np.bool_]
    distance: NDArray[np.float64]
    queries: NDArray[np.int64]
    first_success: NDArray[np.int64]
    adversarials: Tensor
    ledger: dict[str, int]
    clean_correct: NDArray[np.bool_]
    success_any: NDArray[np.bool_]
    success_fresh: NDArray[np.bool_]
    success_clean: NDArray[np.bool_]
    success_undefended: NDArray[np.bool_]
    fresh_draws: NDArray[np.int64]
    fresh_fooled: NDArray[np.int64]
    refusals: list[list[tuple[int, int]]]
    accounts_burnt: NDArray[np.int64]
    hits: list[int | None]
    first_hits: list[int | None]
    stop_reasons: list[str]
    errors: list[str | None]
    traces: list[list[tuple[int, float]]]
    epsilon: float | None
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.success)

    @property
    def success_strict(self) -> NDArray[np.bool_]:
        """The adversarial holds on fresh draws and with the noise off, bool [N]: by nobody's luck."""
        return self.success_fresh & self.success_clean

    def replay_risk(self, n: int) -> NDArray[np.float64]:
        """How likely one of n replays of an image's adversarial reaches the goal, 1 - (1 - p)^n, float64 [N].

        p is the share of the evaluator's fresh draws that did; 0 without an adversarial.
        """
        p = self.fresh_fooled / np.maximum(self.fresh_draws, 1)
        risk: NDArray[np.float64] = 1 - (1 - p) ** n
        return risk

    @property
    def rejected(self) -> NDArray[np.int64]:
        """How many rows a stateful gate refused, [N]."""
        return np.array([sum(last - first + 1 for first, last in runs) for runs in self.refusals], dtype=np.int64)

    @property
    def first_rejected(self) -> NDArray[np.int64]:
        """The query (counted from 1) that was refused first, [N]; 0 = none was."""
        return np.array([runs[0][0] if runs else 0 for runs in self.refusals], dtype=np.int64)

    def distance_at(self, queries: int) -> NDArray[np.float64]:
        """The least adversarial distance of each image within its first `queries` queries, [N]; inf until one is found.

        A success that the evaluator did not confirm is none: inf. Misclassified images are NaN: nothing was asked about them.
        """
        best = [min((far for query, far in trace if query <= queries), default=np.inf) for trace in self.traces]
        return np.where(self.clean_correct, np.where(self._unconfirmed, np.inf, best), np.nan)

    @property
    def _unconfirmed(self) -> NDArray[np.bool_]:
        return self.success_any & ~self.success

    def success_at(self, queries: int, epsilon: float | None = None) -> NDArray[np.bool_]:
        """Which images have an adversarial within `queries` queries and `epsilon` (None: the run's own), bool [N]."""
        radius = self.epsilon if epsilon is None else epsilon
        return np.array([inside(far, radius) for far in self.distance_at(queries)], dtype=bool)

    def summary(self) -> dict[str, Any]:
        """Counts, shares with 95 % Wilson intervals, and median distances at fixed query numbers; plain JSON values.

        Shares of success are over the images that were classified correctly; `robust_accuracy` is over all images.
        """
        n, attacked = len(self), int(self.clean_correct.sum())
        budget = self.meta.get("budget") or int(self.queries.max(initial=0))
        points = [q for q in MILESTONES if q < budget] + [budget]
        shares = {
            "clean_accuracy": (attacked, n),
            "robust_accuracy": (int((self.clean_correct & ~self.success).sum()), n),
            "success": (int(self.success.sum()), attacked),
            "success_any": (int(self.success_any.sum()), attacked),
            "success_fresh": (int(self.success_fresh.sum()), attacked),
            "success_clean": (int(self.success_clean.sum()), attacked),
            "success_strict": (int(self.success_strict.sum()), attacked),
            "success_undefended": (int(self.success_undefended.sum()), attacked),
        }
        return {
            "images": n,
            "misclassified": n - attacked,
            **{name: share_of(*counts) for name, counts in shares.items()},
            "median_distance": {str(q): median(self.distance_at(q)[self.clean_correct]) for q in points},
            "success_at": {str(q): share_of(int(self.success_at(q).sum()), attacked) for q in points},
            "median_queries_to_success": median(self._censored_queries()),
            "queries": int(self.queries.sum()),
            "rejected": int(self.rejected.sum()),
            "accounts_burnt": int(self.accounts_burnt.sum()),
            "hits": None if None in self.hits else sum(hits or 0 for hits in self.hits),
            "errors": sum(error is not None for error in self.errors),
            "noise_only": int((self.success_fresh & ~self.success_clean).sum()),
            "replay_risk": {str(n): float(self.replay_risk(n).sum()) / attacked if attacked else None for n in REPLAYS},
            "unconfirmed": int((self.success_any & ~self.success_fresh).sum()),
            "ledger": dict(self.ledger),
        }

    def _censored_queries(self) -> NDArray[np.float64]:
        """Queries to the first success of each attacked image; inf where there was none, or none that was confirmed."""
        won = (self.first_success > 0) & ~self._unconfirmed
        return np.where(won, self.first_success, np.inf)[self.clean_correct]


def meets_gates(attack: str) -> bool:
    """Whether an attack of this name adapts to gates that remember: OARS, or a rehearsal with an own copy, however wrapped."""
    return not {"oars", "rehearsed"}.isdisjoint(attack.split(":"))


def noticed(image: Mapping[str, Any]) -> bool:
    """Whether a gate took some row of an image of results.json for an attack, refused or not."""
    return bool(image["rejected"] or image.get("hits"))


def share_of(hits: int, n: int) -> dict[str, Any]:
    """A share with its 95 % Wilson interval, as results state it."""
    low, high = wilson(hits, n)
    return {"hits": hits, "of": n, "share": hits / n if n else None, "low": low, "high": high}
