"""A climb that knows labels only: patterns are set at a share `step` nearer than the best one, whatever they are.

What reaches the goal is the best and widens the step; what does not narrows it. The climb ends where the step is small.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import count

from torch import Tensor

from robustbox.distances import distance
from robustbox.protocol import Answer, Query, Task

from .noise import Drawn

WIDER, NARROWER = 1.6, 0.9
"""What a success and a failure make of the step."""

Propose = Callable[[int, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""From the number of a row, the best pattern, its distance [1] and the step: another pattern, and its row [1,C,H,W]."""


def nearer(
    task: Task,
    propose: Propose,
    best: Tensor,
    row: Tensor,
    step: float,
    least: float,
) -> Generator[Query, Answer, Tensor]:
    """The row [1,C,H,W] that a climb ends with: with a step below `least`.

    Args:
        best: a pattern, of which `row` reaches the goal.
        step: how much nearer a pattern is tried, a share of the distance in (0, 0.5]: at first, and at the end.

    Cost: log(least / step) / log(NARROWER) rows where nothing nearer is found, else as many as pay. A refused row is drawn
    again with a step WIDER times as long, and the climb ends at a step as much longer.
    """
    tried, far = best, distance(row - task.image, task.norm).float()

    def draw(_: int) -> Tensor:
        nonlocal tried
        tried, asked = propose(k, best, far, step)
        return asked

    def further(_: int) -> Tensor:
        """After a refusal: go further, and end sooner."""
        nonlocal step, least
        least, step = least * WIDER, min(step * WIDER, 0.5)
        return draw(0)

    for k in count(1):  # noqa: B007  (`draw` reads it)
        drawn = Drawn(draw(0), further)
        if (yield from reached(task, drawn)):
            best, row, step = tried, drawn.rows, min(step * WIDER, 0.5)
            far = distance(row - task.image, task.norm).float()
        else:
            step *= NARROWER
            if step < least:
                break
    return row


def reached(task: Task, drawn: Drawn) -> Generator[Query, Answer, bool]:
    """Whether a row reached the goal: asked twice where the second answer may be another one, else luck would climb."""
    once = task.reached_any((yield drawn.query("init")))
    return once and (not task.stochastic or task.reached_any((yield Query(drawn.rows, "init"))))
