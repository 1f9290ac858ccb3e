"""Searches that start an attack, asked in turns until one of them is plainly ahead (ours).

Which start leads on depends on the network: some are weak to fine waves, others to plain colours whose areas are turned over.
Thirty rows of each tell which of two is ahead after sixty, on nine images in ten that were tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from robustbox.distances import distance
from robustbox.protocol import Answer, Query, Task

from .noise import Drawn

Start = Generator[Query, Answer, Tensor | None]
"""A search that returns a point that reaches the goal [1,C,H,W], or None where it found none."""

TURN = 5
"""Rows that a search asks before it is another one's turn."""
EARLY, LEAD = 15, 4.0
"""From how many rows of each on a search is dropped that is LEAD times as far as the nearest, once it reached the goal."""
LATE = 30
"""After how many rows of each all but the nearest are."""


def race(task: Task, starts: Sequence[Start]) -> Generator[Query, Answer, tuple[int, Tensor] | None]:
    """Ask several searches in turns, the first LATE rows of each at most, and then the nearest one to its end.

    Returns:
        The number of the search that was ahead and what it returned; None where none had reached the goal by then, or it
        returned None.

    Cost: that of the search that was ahead, and at most LATE rows, those of its last query left out, of each other.
    """
    runners = [_Runner(task, number, start) for number, start in enumerate(starts)]
    for rows in range(TURN, LATE + 1, TURN):
        for runner in runners:
            yield from runner.go(rows)
        nearest = min(runner.far for runner in runners)
        if rows >= EARLY:
            runners = [runner for runner in runners if runner.far <= LEAD * nearest or runner.far == math.inf]
        if len(runners) == 1:
            break
    winner = min(runners, key=lambda runner: runner.far)
    if winner.far == math.inf:
        return None
    point = yield from winner.finish()
    return None if point is None else (winner.number, point)


class _Runner:
    """A search that is asked in parts. Its knobs are left out, for they are not the attack's.

    Attributes:
        far: the distance of its nearest row that reached the goal in the race; inf before any did.
    """

    def __init__(self, task: Task, number: int, start: Start) -> None:
        self.number, self.far = number, math.inf
        self._task, self._start, self._asked = task, start, 0
        self._answer: Answer | None = None
        self._point: Tensor | None = None
        self._ended = False

    def go(self, rows: int) -> Generator[Query, Answer, None]:
        """Go on until so many rows were asked in all, or it ends."""
        while self._asked < rows and (query := self._next()):
            drawn = Drawn(query.rows, partial(_one, query.redraw) if query.redraw else None)
            self._answer = answer = yield drawn.query(query.kind)
            self._asked += len(drawn.rows)
            reached = self._task.reached(answer)
            if reached.any():
                there = drawn.rows[reached.to(drawn.rows.device)]
                self.far = min(self.far, float(distance(there - self._task.image, self._task.norm).min()))

    def finish(self) -> Generator[Query, Answer, Tensor | None]:
        """Go on to its end, and return what it returns."""
        while query := self._next():
            self._answer = yield replace(query, knobs=())
        return self._point

    def _next(self) -> Query | None:
        """Its next query; None once it ended."""
        if not self._ended:
            try:
                return next(self._start) if self._answer is None else self._start.send(self._answer)
            except StopIteration as end:
                self._point, self._ended = end.value, True
        return None


def _one(redraw: Callable[[list[int]], Tensor], position: int) -> Tensor:
    """One row of a query drawn again, [1,C,H,W]."""
    return redraw([position])
