"""Query blinding by shifts: each row is moved by a few pixels before it is sent, so that similar rows look different to a gate.

Fingerprints that are tied to positions (Blacklight's with a salt for each pixel: a roll by one pixel leaves 1.6 of 50 windows)
miss a shifted copy, and most classifiers do not care about a shift. The attack is told the answer to the shifted row, unless
the row itself was asked and answered, too.

What is sent is what counts: a shifted row is far from the image, and no adversarial in the books. So when the attack reaches
its goal by a row nearer to the image than any that was confirmed (with an epsilon: by a row inside the ball), that row itself
is asked: of several the nearest first, until one is confirmed or refused. A refused one tells nothing.

A refused row can be drawn again: with another shift, and by the attack where it draws one. So `oars:blinded:NAME` is OARS with
shifts as a second means.

Query cost: that of the attack, and 1 row for each confirmation that is tried: at most one for each row that reached the goal
shifted.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Answer, Query, Search, Task
from robustbox.records import inside

from .wrapper import Collected, Wrapper, relayed, wrapped


@dataclass(frozen=True, kw_only=True)
class Blinded(Wrapper):
    """Query blinding: every row is rolled by a random small shift, and mirrored at random, before it is sent.

    Args:
        shift: largest shift in pixels, in each direction; every row is shifted or mirrored, by one of the ways that there are.
        flip: whether rows are also mirrored left to right, every second one.
        gain: share by which a row must be nearer to the image than the last confirmed one to be confirmed; without epsilon.
    """

    shift: int = 2
    flip: bool = True
    gain: float = 0.1

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise InputError(f"shift must be at least 1, got {self.shift}")
        if not 0 <= self.gain < 1:
            raise InputError(f"gain must be at least 0 and less than 1, got {self.gain}")
        super().__post_init__()

    def search(self, task: Task) -> Search:
        wanted = math.inf

        def ask(query: Query) -> Generator[Query, Answer, Answer]:
            nonlocal wanted
            answer, rows = yield from self._ask(task, query)
            reached = task.reached(answer)
            far = distance(rows - task.image, task.norm).cpu().where(reached, torch.inf)
            told = Collected(len(rows))
            told.put(list(range(len(rows))), answer)
            for which in far.argsort(stable=True).tolist():
                radius = float(far[which])
                if not (radius < wanted and inside(radius, task.epsilon)):
                    break
                own = yield Query(rows[which][None], "step")
                if task.reached_any(own):
                    wanted = radius * (1 - self.gain)
                    break
                if own.status.any():
                    break
                told.put([which], own)
            return told.answer()

        return relayed(self.inner().search(task), ask)

    def _ask(self, task: Task, query: Query) -> Generator[Query, Answer, tuple[Answer, Tensor]]:
        """The answer to a query's rows, shifted; and the rows themselves [n,C,H,W]."""
        rows = query.rows.clone()

        def redraw(positions: list[int]) -> Tensor:
            if query.redraw is not None:
                rows[positions] = query.redraw(positions)
            return self._blind(rows[positions], task.generator)

        answer = yield Query(
            self._blind(rows, task.generator), query.kind, redraw, query.knobs, query.groups, query.account
        )
        return answer, rows

    def _blind(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Each row [n,C,H,W] rolled, and mirrored, in one of the ways that change it."""
        (n, _, height, width), side = rows.shape, 2 * self.shift + 1
        ways = side * side * (2 if self.flip else 1)
        way = torch.randint(1, ways, (n, 1, 1), generator=generator, device=rows.device)  # 0 leaves the row as it is
        mirrored, *offsets = way // side**2, way // side % side, way % side
        dy, dx = ((offset + self.shift) % side - self.shift for offset in offsets)
        y = (torch.arange(height, device=rows.device).view(1, -1, 1) - dy) % height
        x = (torch.arange(width, device=rows.device).view(1, 1, -1) - dx) % width
        x = torch.where(mirrored == 1, width - 1 - x, x)
        return rows[torch.arange(n, device=rows.device).view(-1, 1, 1), :, y, x].movedim(-1, 1).contiguous()


@cache
def load(name: str) -> type[Blinded]:
    """Any attack with its rows shifted by a few pixels: `blinded:nes` hides similar queries from a gate."""
    return wrapped(Blinded, "blinded", name)
