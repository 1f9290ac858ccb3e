"""Rows on their way to the black box and answers on their way back: budgets, the buffer, fused passes, and the books."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox.batching import BatchSize
from robustbox.consensus import consensus
from robustbox.distances import distance
from robustbox.errors import ModelError
from robustbox.goals import goal, reached
from robustbox.oracle import Oracle, Phase
from robustbox.protocol import ANSWERED, BANNED, Answer, Query, Search, Task
from robustbox.records import Record


@dataclass(slots=True)
class Run:
    """One attack in flight."""

    index: int
    task: Task
    record: Record
    search: Search
    started: bool = False
    sender: int = 0  # which of the attacker's accounts sent its last query
    cut: bool = False  # the budget covered only a part of its last query
    failure: Exception | None = None
    parts: list[Answer] = field(default_factory=list)
    banned: bool = False  # the account that sent its last query is served no more
    put_by: list[Answer] | None = None  # its last answer, while its success is put to the vote


@dataclass(slots=True)
class Piece:
    """A slice of one attack's query, on its way to the black box."""

    run: Run
    rows: Tensor
    phase: Phase
    goal: int
    account: int


class Dispatch:
    """Fuses the rows of many attacks into passes, charges them, and brings the answers back.

    Args:
        oracle: the door to the black box; its total budget holds over all images.
        runs: all attacks in flight, each at the place of its index.
        max_rows: rows fused into one forward pass, or "auto".
        eot: how often each row is asked; the attack and the books get the consensus.
    """

    def __init__(self, oracle: Oracle, runs: list[Run], max_rows: int | Literal["auto"], eot: int) -> None:
        self.oracle = oracle
        self.batch = BatchSize(max_rows)
        self._eot = eot
        self._images = torch.stack([run.task.image for run in runs])
        self._buffer: list[Piece] = []
        self._buffered = 0

    def remaining(self, run: Run) -> int:
        """Rows that one image may still be charged, of its own budget and of all images' together."""
        left = run.record.budget - run.record.spent
        if self.oracle.total_budget is not None:
            left = min(left, self.oracle.total_budget - self.oracle.charged - self._buffered * self._eot)
        return left

    def send(self, run: Run, query: Query, account: int) -> None:
        """Put as much of a query as the budget covers on its way; the answer comes in `run.parts`, at the latest by `flush`."""
        rows = query.rows
        granted = min(rows.shape[0], self.remaining(run) // self._eot)
        run.cut = granted < rows.shape[0]
        task = run.task
        phase: Phase = "calibrate" if query.kind == "calibrate" else "attack"
        aim = goal(task.label, task.target)
        start = 0
        while start < granted and run.failure is None:
            capacity = max(self.batch.size // self._eot, 1)  # changes with the passes, while the buffer is empty
            stop = min(granted, start + capacity - self._buffered)
            part = rows[start:stop] if stop - start < rows.shape[0] else rows
            self._buffer.append(Piece(run, part, phase, aim, account))
            self._buffered += stop - start
            start = stop
            if self._buffered == capacity:
                self.flush()

    def flush(self) -> None:
        """Send what is buffered.

        Raises:
            ModelError: the black box failed; the rows of this pass stay charged.
        """
        pieces, self._buffer, self._buffered = self._buffer, [], 0
        if not pieces:
            return
        start = self.oracle.clock()
        rows = torch.cat([piece.rows for piece in pieces])
        if bad := self.oracle.inadmissible(rows):
            pieces = self._refuse(pieces, bad)
            if not pieces:
                return
            rows = torch.cat([piece.rows for piece in pieces])
        rows = self.oracle.round(rows)
        counts = [piece.rows.shape[0] for piece in pieces]
        phases: Counter[Phase] = Counter()
        copies = self._eot
        for piece, count in zip(pieces, counts, strict=True):
            phases[piece.phase] += count * copies
        accounts = np.repeat([piece.account for piece in pieces], [count * copies for count in counts])
        sent = rows if copies == 1 else rows.repeat_interleave(copies, dim=0)
        answer = self._ask(sent, torch.from_numpy(accounts), phases)
        self._note(pieces, counts, rows, answer)
        self.batch.observe(len(sent), self.oracle.clock() - start, copies)

    def _refuse(self, pieces: list[Piece], bad: list[int]) -> list[Piece]:
        """Drop the queries that hold inadmissible rows: nothing of these pieces is charged, their attacks are told."""
        owner = np.repeat(np.arange(len(pieces)), [piece.rows.shape[0] for piece in pieces])
        refused = set(owner[bad].tolist())
        for k in refused:
            pieces[k].run.failure = ValueError("the attack asked a row with NaN or outside the box [0, 1]")
        return [piece for k, piece in enumerate(pieces) if k not in refused]

    def _ask(self, rows: Tensor, accounts: Tensor, phases: dict[Phase, int]) -> Answer:
        try:
            return self.oracle.ask(rows, accounts, phases)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise ModelError(f"the device cannot hold one row: {error}") from error
            self.batch.out_of_memory()
            half = len(rows) // 2  # already charged
            return joined([self._ask(rows[:half], accounts[:half], {}), self._ask(rows[half:], accounts[half:], {})])

    # Answers on their way back: the books first, then the attack's share.

    def _note(self, pieces: list[Piece], counts: list[int], rows: Tensor, answer: Answer) -> None:
        """Book the answers to rows [n,C,H,W], each asked `eot` times in a row, and hand the attacks their shares."""
        visible = consensus(self.oracle.visible(answer), self._eot)
        goals = np.repeat([piece.goal for piece in pieces], counts)
        solid = reached(goals, visible.labels.numpy(), visible.status.numpy())
        once = solid
        if self._eot > 1:
            each = reached(np.repeat(goals, self._eot), answer.labels.numpy(), answer.status.numpy())
            once = solid | each.reshape(-1, self._eot).any(axis=1)
        if once.any():
            self._record(pieces, counts, rows, np.flatnonzero(once), solid[once])
        if answer.status.any():
            self._count_refused(pieces, counts, answer.status.numpy())
        scores = torch.split(visible.scores, counts) if visible.scores is not None else (None,) * len(counts)
        shares = zip(
            pieces,
            torch.split(visible.labels, counts),
            scores,
            torch.split(visible.status, counts),
            counts,
            strict=True,
        )
        for piece, its_labels, its_scores, its_status, count in shares:
            piece.run.parts.append(Answer(its_labels, its_scores, its_status))
            piece.run.record.spent += count * self._eot

    def _record(
        self,
        pieces: list[Piece],
        counts: list[int],
        rows: Tensor,
        hits: NDArray[np.intp],
        solid: NDArray[np.bool_],
    ) -> None:
        """Update the books by the rows that reached their goals (positions in the pass, ascending), solidly or once."""
        owner = np.repeat(np.arange(len(pieces)), counts)[hits]
        first = np.cumsum([0, *counts[:-1]])
        images = np.array([piece.run.index for piece in pieces])[owner]
        which, whose = torch.from_numpy(np.stack((hits, images))).to(rows.device)
        norm = pieces[0].run.task.norm  # the run's
        distances = distance(rows[which] - self._images[whose], norm).tolist()
        improved: dict[int, int] = {}
        for position, k, far, held in zip(hits.tolist(), owner.tolist(), distances, solid.tolist(), strict=True):
            record = pieces[k].run.record
            record.lucky = min(record.lucky, far)
            if held and far < record.distance:
                record.distance = far
                record.trace.append((record.spent + (position - int(first[k]) + 1) * self._eot, far))
                improved[k] = position
        for k, position in improved.items():
            pieces[k].run.record.best = rows[position].clone()

    def _count_refused(self, pieces: list[Piece], counts: list[int], status: NDArray[np.uint8]) -> None:
        """Count the rows of each piece that were not answered, status [n eot], and note whose account is banned."""
        ends = np.cumsum(np.array(counts) * self._eot)
        for piece, its in zip(pieces, np.split(status, ends[:-1]), strict=True):
            refused = its != ANSWERED
            if refused.any():
                record = piece.run.record
                record.refuse((record.spent + 1 + np.flatnonzero(refused)).tolist())
                piece.run.banned |= bool((its == BANNED).any())


def joined(parts: list[Answer]) -> Answer:
    """The answers of a query's pieces as one."""
    if len(parts) == 1:
        return parts[0]
    scores = [part.scores for part in parts if part.scores is not None]
    return Answer(
        torch.cat([part.labels for part in parts]),
        torch.cat(scores) if scores else None,
        torch.cat([part.status for part in parts]),
    )
