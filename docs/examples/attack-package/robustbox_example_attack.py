"""Straight lines: the simplest decision-based attack there is, as an example of an attack of your own."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustbox.errors import InputError
from robustbox.protocol import Attack, Norm, Query, Search, Task


@dataclass(frozen=True)
class StraightLines(Attack):
    """Random images, each drawn towards the original by bisection until it is just across the boundary.

    Query cost: 1 for each start, and `steps` for each that reached the goal.

    Args:
        steps: halvings of each line.
    """

    name: ClassVar[str] = "straight-lines"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")

    steps: int = 8

    def check(self, task: Task) -> None:
        """Refuse options that make no sense, before a query is asked."""
        if self.steps < 1:
            raise InputError("straight-lines: steps must be 1 or more")

    def search(self, task: Task) -> Search:
        """Start after start, until the budget ends the search."""
        while True:
            far = torch.rand(task.image.shape, generator=task.generator, device=task.image.device)
            answer = yield Query(far[None], "init")
            if not task.reached_any(answer):
                continue
            low, high = 0.0, 1.0  # of the way from the image to the start: not across, and across
            for _ in range(self.steps):
                middle = (low + high) / 2
                answer = yield Query(torch.lerp(task.image, far, middle)[None], "line")
                low, high = (low, middle) if task.reached_any(answer) else (middle, high)
