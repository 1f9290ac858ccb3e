"""The query loop: drives the attacks on many images in lock-step and fuses their rows into forward passes.

One round asks every live attack, in image order, for its next query; the rows flow into a buffer that is sent whenever it
holds a full pass (`dispatch.py`), and once more at the end of the round. So no more rows are in flight than one pass and one
query, whatever the number of images, and an image's answers do not depend on its neighbours (as far as the black box answers
row by row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from robustbox.dispatch import Dispatch, Run, joined
from robustbox.oracle import Oracle
from robustbox.protocol import ANSWERED, Attack, BudgetExhausted, Query, Task
from robustbox.records import Record, StopReason, inside

VOTES, AGREED, LEAST = 9, 7, 3
"""Answers that are asked before a stochastic black box's success ends an attack, how many of them must agree, and the least
number of consensuses where each row is asked several times.

A mere majority would end attacks by luck: of rows that fool four answers in ten, every fourth, with budget left to find better
ones, so that the defense looks strong. Of these seven in nine lets 2.5 % pass.
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, once a round: rows charged and at most to be charged, images live, done, and won."""

    rows: int
    total: int
    live: int
    done: int
    succeeded: int


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
        self._keep_going = keep_going
        self._progress = progress
        tasks = list(tasks)
        each = zip(tasks, records, attack.searches(tasks), strict=True)
        self._runs = [Run(k, task, record, search) for k, (task, record, search) in enumerate(each)]
        self._dispatch = Dispatch(oracle, self._runs, max_rows, eot)
        self.batch = self._dispatch.batch

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
                self._dispatch.flush()
                live = [run for run in live if not run.record.stop]
                if self._progress is not None:
                    self._progress(self._state(len(live)))
        finally:
            for run in live:
                if not run.record.stop:  # others ended in this very round
                    self._finish(run, "stopped")

    # One image's turn: its last answer goes in, its next query comes out.

    def _advance(self, run: Run) -> None:
        record = run.record
        if run.banned and self._last_banned(run):
            return self._finish(run, "banned")
        if run.put_by is not None and self._upheld(run):
            return self._finish(run, "success")
        wins = run.task.epsilon is not None and inside(record.distance, run.task.epsilon)
        if wins and not self._keep_going and run.failure is None:
            if not self.oracle.box.stochastic:
                return self._finish(run, "success")
            if self._dispatch.remaining(run) >= self._eot:
                return self._vote(run)
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
        self._dispatch.send(run, query, account)

    def _vote(self, run: Run) -> None:
        """Ask for a success again before it ends the attack: the answer may have been luck. At the attacker's expense."""
        assert run.record.best is not None
        run.put_by, run.parts = run.parts, []
        run.sender = 0
        again = run.record.best.expand(max(-(-VOTES // self._eot), LEAST if self._eot > 1 else 1), -1, -1, -1)
        self._dispatch.send(run, Query(again), run.record.sender(0))

    def _upheld(self, run: Run) -> bool:
        """Whether the vote confirmed the success; if not, the attack goes on with the answer that was put by.

        Where a gate refused all of the vote, there is no evidence against the success: it stands, for the evaluator to judge.
        """
        answer = joined(run.parts)
        run.parts, run.put_by = run.put_by or [], None
        answered, agreed = int((answer.status == ANSWERED).sum()), int(run.task.reached(answer).sum())
        if not answered or agreed * VOTES >= answered * AGREED:
            return True
        run.record.overrule()
        return False

    @staticmethod
    def _last_banned(run: Run) -> bool:
        """Note a ban; whether it leaves the attacker without an account."""
        run.banned = False
        run.record.ban(run.sender)
        return run.sender == 0 and run.record.unopened == 0

    def _resume(self, run: Run) -> Query:
        run.task.remaining = self._dispatch.remaining(run) // self._eot
        run.task.accounts = run.record.unopened
        if not run.started:
            run.started = True
            return next(run.search)
        if run.failure is not None:
            run.search.throw(run.failure)
            raise run.failure  # the attack caught it and asked again: it may not go on
        if run.cut:
            run.search.throw(BudgetExhausted())
            raise BudgetExhausted  # the attack caught it and asked again: it may not go on
        answer, run.parts = joined(run.parts), []
        return run.search.send(answer)

    @staticmethod
    def _check(query: Query, task: Task) -> None:
        rows, image = query.rows, task.image
        if rows.ndim != 4 or rows.shape[1:] != image.shape or not rows.shape[0]:
            raise ValueError(f"the attack asked rows of shape {[*rows.shape]}, expected {['n', *image.shape]}")
        if rows.dtype != torch.float32 or rows.device != image.device:
            raise ValueError(f"the attack asked {rows.dtype} rows on {rows.device}, expected float32 on {image.device}")

    def _finish(self, run: Run, reason: StopReason) -> None:
        run.record.stop = reason
        run.task.remaining = 0
        try:
            run.search.close()
        except Exception as error:
            run.record.error = run.record.error or f"{type(error).__name__}: {error}"

    def _state(self, live: int) -> Progress:
        runs = self._runs
        won = sum(inside(run.record.distance, run.task.epsilon) for run in runs)
        total = sum(run.record.spent if run.record.stop else run.record.budget for run in runs)
        total = min(total, self.oracle.total_budget or total)
        return Progress(self.oracle.charged, total, live, len(runs) - live, won)
