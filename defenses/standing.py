"""What a stateful gate holds against its accounts, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustbox.identity import sha256
from robustbox.protocol import Answer

from .histories import Cell
from .unanswered import Unanswered


@dataclass(slots=True)
class Standing:
    """What a gate holds against an account: queries received, hits, the first of them (from 1; 0: none), and the ban."""

    rows: int = 0
    hits: int = 0
    first_hit: int = 0
    banned: bool = False


@dataclass(slots=True)
class Decision:
    """What a gate does with a row.

    Args:
        status: the row's.
        asked: whether the model is asked.
        cell: under `decoy`, that of its answer.
        fingerprint: what was stored of it, or None.
        reset: whether the history was begun anew after it.
    """

    status: int
    asked: bool
    cell: Cell | None = None
    fingerprint: Any = None
    reset: bool = False


class Books:
    """The standings of a gate's accounts, and what was decided about rows of theirs that got no answer.

    Attributes:
        judged: queries that were judged, those of banned accounts and of the evaluator left out.
        seconds: spent on them, the model's time not included.
    """

    def __init__(self) -> None:
        self._accounts: dict[int, Standing] = {}
        self._unanswered = Unanswered[tuple[str, Decision]]()
        self.judged, self.seconds = 0, 0.0

    def standing(self, account: int) -> Standing:
        """What is held against an account; a fresh one if it was never heard of."""
        return self._accounts.setdefault(account, Standing())

    def take_over(self, account: int, standing: Standing) -> None:
        """Begin with what was held against an account before."""
        self._accounts[account] = standing

    def noticed(self, account: int) -> tuple[int, int]:
        """The hits of an account, and the first of them."""
        standing = self._accounts.get(account, Standing())
        return standing.hits, standing.first_hit

    def put_by(self, rows: Tensor, accounts: Sequence[int], decisions: Sequence[Decision]) -> None:
        """Keep what was decided about rows [n,C,H,W] to which the model failed to give answers, the evaluator's left out."""
        own = [k for k, account in enumerate(accounts) if account >= 0]
        self._unanswered.keep([accounts[k] for k in own], [(sha256(rows[k]), decisions[k]) for k in own])

    def taken_up(self, account: int, rows: Tensor, position: int) -> Decision | None:
        """What was put by about the row at a position of [n,C,H,W] that an account sends again; other rows end the waiting."""
        kept = self._unanswered.take(account)
        if kept is None:
            return None
        known, decision = kept
        if known != sha256(rows[position]):
            self._unanswered.forget(account)
            return None
        return decision

    def statistics(self, bytes_per_query: float) -> dict[str, object]:
        """Plain JSON values.

        `rows` received, `hits`, `banned_rows` refused after a ban, accounts seen, with a hit, and banned; `first_hit`: which
        of an account's own queries was its first hit, counting from 1, for those that have one; `bytes_per_query` of a
        stored fingerprint, and `milliseconds_per_query` of the gate alone.
        """
        standings = self._accounts
        rows = sum(standing.rows for standing in standings.values())
        return {
            "rows": rows,
            "hits": sum(standing.hits for standing in standings.values()),
            "banned_rows": rows - self.judged,
            "accounts": len(standings),
            "accounts_hit": sum(standing.hits > 0 for standing in standings.values()),
            "accounts_banned": sum(standing.banned for standing in standings.values()),
            "first_hit": {str(account): s.first_hit for account, s in standings.items() if s.hits},
            "bytes_per_query": bytes_per_query,
            "milliseconds_per_query": 1e3 * self.seconds / self.judged if self.judged else 0.0,
        }


def among_refusals(answer: Answer | None, decisions: Sequence[Decision], device: torch.device, width: int) -> Answer:
    """The model's answer to the rows that it was asked (None: to none), among refusals for the others.

    Args:
        answer: for the decisions with `asked`, in their order.
        decisions: n of them.
        device: where an answer of refusals alone stands.
        width: classes K that scores of refusals alone have; 0: they have none.
    """
    device = device if answer is None else answer.labels.device
    where = torch.tensor([decision.asked for decision in decisions], device=device).nonzero().flatten()
    labels = torch.full((len(decisions),), -1, device=device)
    statuses = torch.tensor([decision.status for decision in decisions], dtype=torch.uint8, device=device)
    scores = None
    if answer is not None:
        labels[where], statuses[where] = answer.labels, answer.status
        if answer.scores is not None:
            scores = answer.scores.new_full((len(decisions), answer.scores.shape[1]), torch.nan)
            scores[where] = answer.scores
    elif width:
        scores = torch.full((len(decisions), width), torch.nan, device=device)
    return Answer(labels, scores, statuses)


def exchange_decoys(answer: Answer, decisions: Sequence[Decision]) -> None:
    """Let cells keep the answers to rows that the model was asked, and give theirs to the others."""
    cells = [(position, d.asked, d.cell) for position, d in enumerate(decisions) if d.cell is not None]
    for position, asked, cell in cells:
        if asked:
            cell.keep(answer, position)
    for position, asked, cell in cells:
        if not asked:
            cell.give(answer, position)
