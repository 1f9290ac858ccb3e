"""What random searches on scores share: a row to stand on, and candidates that take its place where their loss is lower.

Scores of a stochastic black box are compared in pairs: candidate and incumbent are asked side by side, so that no lucky draw
of the incumbent's freezes the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

from torch import Tensor, cat

from robustbox.protocol import Answer, Knob, Query, Task

from .losses import Loss, losses
from .noise import Drawn

Draw = Callable[[], Tensor]
"""Draws a row [1,C,H,W]."""


class Climb:
    """Where a search stands.

    Args:
        task: the image and its goal.
        loss: what is compared.
        knobs: the scales of the candidates.

    Attributes:
        row: the incumbent [1,C,H,W]; the image until something was asked.
        value: its loss as last answered; inf until it was.
        reached: whether the row that was asked last reached the goal: the candidate, or, where answers are stochastic, the
            incumbent when it was asked again.
    """

    def __init__(self, task: Task, loss: Loss, knobs: tuple[Knob, ...] = ()) -> None:
        self.row, self.value, self.reached = task.image[None], math.inf, False
        self._task, self._loss, self._knobs = task, loss, knobs

    def start(self, row: Tensor, draw: Draw | None = None) -> Generator[Query, Answer, bool]:
        """Stand on a row [1,C,H,W] if it is answered; returns whether it was.

        Args:
            row: the first row.
            draw: draws another one in its place; None where it is not random.

        Cost: 1 row.
        """
        drawn = Drawn(row, (lambda _: draw()) if draw else None)
        answer = yield drawn.query("init")
        self.row, self.value = drawn.rows, float(losses(self._task, answer, self._loss))
        self.reached = self._task.reached_any(answer)
        return self.value < math.inf

    def challenge(self, row: Tensor, draw: Draw | None = None) -> Generator[Query, Answer, bool]:
        """Ask a candidate [1,C,H,W] and stand on it if its loss is lower; returns whether it is. A refused one changes nothing.

        Args:
            row: the candidate.
            draw: draws another one in its place; None where it is not random.

        Cost: 1 row, or 2 where answers are stochastic (the incumbent's is the second).
        """
        rows = [row, self.row] if self._task.stochastic else [row]
        drawn = Drawn(cat(rows), (lambda position: self.row if position else draw()) if draw else None)
        answer = yield drawn.query("step", self._knobs)
        values = losses(self._task, answer, self._loss).tolist()
        if self._task.stochastic and values[1] < math.inf:
            self.value = values[1]
        self.reached = bool(self._task.reached(answer)[-1])
        won: bool = values[0] < self.value
        if won:
            self.row, self.value = drawn.rows[:1], values[0]
        return won
