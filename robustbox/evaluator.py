"""The evaluator: checks images before an attack and adversarials after it, on ledgers of its own.

Where a black box answers at random there are several things that a success may mean, and none is the others (the results
hold all of them): some answer was wrong (`any`), most fresh answers to the adversarial are (`fresh`), the answer without
the noise is (`clean`), both (`strict`); and how likely one of n replays is to be answered wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox.goals import reached
from robustbox.identity import derive_seed
from robustbox.oracle import Oracle
from robustbox.protocol import Defense

DRAWS = 25
"""Answers whose majority decides where the black box is stochastic."""


def undefended(oracle: Oracle) -> Oracle:
    """The oracle of the model behind all defenses, on the same books."""
    box = oracle.box
    while box.inner is not None:
        box = box.inner
    bare = Oracle(box, levels=oracle.levels)
    bare.ledger = oracle.ledger
    return bare


def quiet(oracle: Oracle, defenses: Sequence[Defense], seed: int) -> Oracle:
    """The oracle of the pipeline with its noise off, on the same books: without the defenses that answer at random.

    The other defenses stand as new, in their order. Where nothing answers at random, and where the model itself does (its
    noise cannot be taken off), this is the oracle as it is.

    Args:
        oracle: of the full pipeline.
        defenses: what stands around the model, outermost first.
        seed: of the defenses.
    """
    bare = undefended(oracle)
    if not oracle.box.stochastic or bare.box.stochastic:
        return oracle
    box = bare.box
    for recipe in reversed(defenses):
        wrapped = recipe.wrap(box, seed)
        box = box if wrapped.stochastic else wrapped
    still = Oracle(box, levels=oracle.levels)
    still.ledger = oracle.ledger
    return still


def clerk(*identity: object) -> int:
    """An account of the evaluator's: below 0, so that a stateful gate judges its rows and does not remember them."""
    return -1 - derive_seed(*identity)


def draws(oracle: Oracle) -> int:
    """How often the evaluator asks each row."""
    return DRAWS if oracle.box.stochastic else 1


def share_reached(
    oracle: Oracle, rows: Tensor, goals: Sequence[int], accounts: Sequence[int], fused: int
) -> NDArray[np.float64]:
    """The share of answers that reach the goal, for each row: [n] -> float64 [n].

    Args:
        oracle: whom to ask.
        rows: [n,C,H,W] in [0, 1].
        goals: n goals (`robustbox.goals.goal`).
        accounts: n accounts of the evaluator's; each row's every draw is sent from one of its own that derives from it.
        fused: rows a pass.

    Query cost: n rows where the black box is deterministic, 25 n where it is stochastic, all on the `verify` ledger.
    """
    times = draws(oracle)
    index = np.repeat(np.arange(len(rows)), times)
    senders = np.array([account if not k else clerk(account, k) for account in accounts for k in range(times)])
    hits = []
    for start in range(0, len(index), fused):
        part = index[start : start + fused]
        sent = oracle.round(rows[torch.from_numpy(part).to(rows.device)])
        answer = oracle.ask(sent, torch.from_numpy(senders[start : start + fused]), {"verify": len(part)})
        hits.append(reached(np.array(goals)[part], answer.labels.numpy(), answer.status.numpy()))
    shares: NDArray[np.float64] = np.concatenate(hits).reshape(-1, times).mean(axis=1)
    return shares


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """What the evaluator was told when it asked for adversarials again, for N images (False where there was none to ask for).

    Attributes:
        draws: int64 [N], how often it asked the full pipeline.
        fooled: int64 [N], how many of these answers reached the goal.
        clean: bool [N], the adversarial reached it with the pipeline's noise off.
        undefended: bool [N], on the model without its defenses.
    """

    draws: NDArray[np.int64]
    fooled: NDArray[np.int64]
    clean: NDArray[np.bool_]
    undefended: NDArray[np.bool_]

    @classmethod
    def of(cls, n: int) -> Verdicts:
        """Nothing asked yet."""
        return cls(
            np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        )

    @property
    def fresh(self) -> NDArray[np.bool_]:
        """Which adversarials reached the goal in most fresh draws, bool [N]."""
        return self.fooled > self.draws / 2


def judge(
    verdicts: Verdicts,
    found: list[int],
    oracle: Oracle,
    still: Oracle,
    rows: Tensor,
    goals: Sequence[int],
    accounts: Sequence[int],
    fused: int,
) -> None:
    """Fill the verdicts on the adversarials [n,C,H,W] of the images `found`, each question asked once at most.

    Query cost: n rows of the full pipeline (25 n where it is stochastic), n of the undefended model where that is another,
    and n of the pipeline without its noise (`still`) where that is a third.
    """
    bare = undefended(oracle)
    shares = share_reached(oracle, rows, goals, accounts, fused)
    verdicts.draws[found] = draws(oracle)
    verdicts.fooled[found] = np.rint(shares * draws(oracle))
    fresh = shares > 0.5
    apart = bare.box is not oracle.box
    verdicts.undefended[found] = share_reached(bare, rows, goals, accounts, fused) > 0.5 if apart else fresh
    if still.box is oracle.box:
        verdicts.clean[found] = fresh
    elif still.box is bare.box:
        verdicts.clean[found] = verdicts.undefended[found]
    else:
        verdicts.clean[found] = share_reached(still, rows, goals, accounts, fused) > 0.5
