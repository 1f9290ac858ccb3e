"""The evaluator: checks images before an attack and adversarials after it, on ledgers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox.goals import reached
from robustbox.identity import derive_seed
from robustbox.oracle import Oracle

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
