"""The query loop: drives the attacks on many images in lock-step and fuses their rows into forward passes.

One round asks every live attack, in image order, for its next query; the rows flow into a buffer that is sent whenever it
holds a full pass, and once more at the end of the round. So no more rows are in flight than one pass and one query, whatever
the number of images, and an image's answers do not depend on its neighbours (as far as the black box answers row by row).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
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
from robustbox.protocol import ANSWERED, BANNED, Answer, Attack, BudgetExhausted, Query, Search, Task
from robustbox.records import Record, StopReason, inside

VOTES = 9
"""Answers of which the majority must agree before a stochastic black box's success ends an attack."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, once a round: rows charged and at most to be charged, images live, done, and won."""

    rows: int
    total: int
    live: int
    done: int
    succeeded: int


@dataclass(slots=True)
class _Run:
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
    put_by: list[Answer] | None = None  # its last answer, while its success is put to the vote


@dataclass(slots=True)
class _Piece:
    """A slice of one attack's query, on its way to the black box."""

    run: _Run
    rows: Tensor
    phase: Phase
    goal: int
    account: int


class QueryLoop:
    """Runs one attack on many tasks.

    Args:
        oracle: the door to the black box; its total budget holds over all images.
        attack: the attack.
        tasks, records: one each for every image; records are filled in place.
        keep_going: with an epsilon, go on after the first success inside the ball and minimise.
        max_rows: rows fused into one forward pass, or "auto".
        progress: called once a round.
        eot: how often each row is asked; the attack and the books get the consensus.
    """

    def __init__(
        self,
        oracle: Oracle,
        attack: Attack,
        tasks: Iterable[Task],
        records: Iterable[Record],
        keep_going: bool = False,
        max_rows: int | Literal["auto"] = "auto",
        progress: Callable[[Progress], None] | None = None,
        eot: int = 1,
    ) -> None:
        self.oracle = oracle
        self._eot = eot
        self.batch = BatchSize(max_rows)
        self._keep_going = keep_going
        self._progress = progress
        pairs = enumerate(zip(tasks, records, strict=True))
        self._runs = [_Run(k, task, record, attack.search(task)) for k, (task, record) in pairs]
        self._images = torch.stack([run.task.image for run in self._runs])
        self._buffer: list[_Piece] = []
        self._buffered = 0

    def run(self) -> None:
        """Run all attacks to their ends.

        Raises:
            ModelError: the black box failed; the records hold everything up to then.
        """
        live = self._runs
        try:
            while live:
                for run in live:
                    self._advance(run)
                self._flush()
                live = [run for run in live if not run.record.stop]
                if self._progress is not None:
                    self._progress(self._state(len(live)))
        finally:
            for run in live:
                self._finish(run, "stopped")

    # One image's turn: its last answer goes in, its next query comes out.

    def _advance(self, run: _Run) -> None:
        record = run.record
        if self._banned(run):
            return self._finish(run, "banned")
        if run.put_by is not None and self._upheld(run):
            return self._finish(run, "success")
        wins = run.task.epsilon is not None and inside(record.distance, run.task.epsilon)
        if wins and not self._keep_going and run.failure is None:
            return self._vote(run) if self.oracle.box.stochastic else self._finish(run, "success")
        try:
            query = self._resume(run)
            self._check(query, run.task)
            account = record.sender(query.account)
        except StopIteration:
            return self._finish(run, "finished")
        except BudgetExhausted:
            own = record.budget - record.spent < self._eot
            return self._finish(run, "budget" if own else "total-budget")
        except Exception as error:  # an attack that raises ends its own image, not the run
            record.error = f"{type(error).__name__}: {error}"
            return self._finish(run, "error")
        run.sender = query.account
        self._enqueue(run, query, account)

    def _vote(self, run: _Run) -> None:
        """Ask for a success again before it ends the attack: the answer may have been luck. At the attacker's expense."""
        assert run.record.best is not None
        run.put_by, run.parts = run.parts, []
        run.sender = 0
        self._enqueue(run, Query(run.record.best.expand(-(-VOTES // self._eot), -1, -1, -1)), run.record.sender(0))

    def _upheld(self, run: _Run) -> bool:
        """Whether the vote confirmed the success; if not, the attack goes on with the answer that was put by."""
        votes = run.task.reached(_joined(run.parts)) if run.parts else torch.zeros(1)
        run.parts, run.put_by = run.put_by or [], None
        if votes.double().mean() > 0.5:
            return True
        run.record.overrule()
        return False

    def _banned(self, run: _Run) -> bool:
        """Note a ban; whether it leaves the attacker without an account."""
        if not any((part.status == BANNED).any() for part in run.parts):
            return False
        run.record.ban(run.sender)
        return run.sender == 0 and run.record.unopened == 0

    def _resume(self, run: _Run) -> Query:
        run.task.remaining = self._remaining(run) // self._eot
        run.task.accounts = run.record.unopened
        if not run.started:
            run.started = True
            return next(run.search)
        if run.failure is not None:
            return run.search.throw(run.failure)
        if run.cut:
            run.search.throw(BudgetExhausted())
            raise BudgetExhausted  # the attack caught it and asked again: it may not go on
        answer, run.parts = _joined(run.parts), []
        return run.search.send(answer)

    @staticmethod
    def _check(query: Query, task: Task) -> None:
        rows, image = query.rows, task.image
        if rows.ndim != 4 or rows.shape[1:] != image.shape or not rows.shape[0]:
            raise ValueError(f"the attack asked rows of shape {[*rows.shape]}, expected {['n', *image.shape]}")
        if rows.dtype != torch.float32 or rows.device != image.device:
            raise ValueError(f"the attack asked {rows.dtype} rows on {rows.device}, expected float32 on {image.device}")

    def _finish(self, run: _Run, reason: StopReason) -> None:
        run.record.stop = reason
        run.task.remaining = 0
        try:
            run.search.close()
        except Exception as error:
            run.record.error = run.record.error or f"{type(error).__name__}: {error}"

    # Rows on their way: budget, buffer, forward pass.

    def _remaining(self, run: _Run) -> int:
        left = run.record.budget - run.record.spent
        if self.oracle.total_budget is not None:
            left = min(left, self.oracle.total_budget - self.oracle.charged - self._buffered * self._eot)
        return left

    def _enqueue(self, run: _Run, query: Query, account: int) -> None:
        rows = query.rows
        granted = min(rows.shape[0], self._remaining(run) // self._eot)
        run.cut = granted < rows.shape[0]
        task = run.task
        phase: Phase = "calibrate" if query.kind == "calibrate" else "attack"
        aim = goal(task.label, task.target)
        start = 0
        while start < granted and run.failure is None:
            capacity = max(self.batch.size // self._eot, 1)  # changes with the passes, while the buffer is empty
            stop = min(granted, start + capacity - self._buffered)
            part = rows[start:stop] if stop - start < rows.shape[0] else rows
            self._buffer.append(_Piece(run, part, phase, aim, account))
            self._buffered += stop - start
            start = stop
            if self._buffered == capacity:
                self._flush()

    def _flush(self) -> None:
        pieces, self._buffer, self._buffered = self._buffer, [], 0
        if not pieces:
            return
        start = time.perf_counter()
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
        self.batch.observe(len(sent), time.perf_counter() - start)

    def _refuse(self, pieces: list[_Piece], bad: list[int]) -> list[_Piece]:
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
            return _joined([self._ask(rows[:half], accounts[:half], {}), self._ask(rows[half:], accounts[half:], {})])

    # Answers on their way back: the books first, then the attack's share.

    def _note(self, pieces: list[_Piece], counts: list[int], rows: Tensor, answer: Answer) -> None:
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
            self._count_refused(pieces, counts, answer.status.numpy() != ANSWERED)
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
        pieces: list[_Piece],
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

    def _count_refused(self, pieces: list[_Piece], counts: list[int], refused: NDArray[np.bool_]) -> None:
        """Count the rows of each piece that were not answered; refused is [n eot]."""
        ends = np.cumsum(np.array(counts) * self._eot)
        for piece, its in zip(pieces, np.split(refused, ends[:-1]), strict=True):
            if its.any():
                record = piece.run.record
                record.first_refused = record.first_refused or record.spent + int(its.argmax()) + 1
                record.refused += int(its.sum())

    def _state(self, live: int) -> Progress:
        runs = self._runs
        won = sum(inside(run.record.distance, run.task.epsilon) for run in runs)
        total = sum(run.record.spent if run.record.stop else run.record.budget for run in runs)
        total = min(total, self.oracle.total_budget or total)
        return Progress(self.oracle.charged, total, live, len(runs) - live, won)


def _joined(parts: list[Answer]) -> Answer:
    """The answers of a query's pieces as one."""
    if len(parts) == 1:
        return parts[0]
    scores = [part.scores for part in parts if part.scores is not None]
    return Answer(
        torch.cat([part.labels for part in parts]),
        torch.cat(scores) if scores else None,
        torch.cat([part.status for part in parts]),
    )
