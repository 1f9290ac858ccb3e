"""What an attacker remembers of its own rows, to keep new ones at a distance that a gate lets pass.

A gate compares each row with earlier ones. The points of a line search close in on each other, and cannot be drawn again:
sooner or later one is refused. An attacker that knows how far apart rows must be need not pay to find out: it keeps a sketch
of each row that it sent, and moves a point that would come too near to one of them away, by white noise of the missing length.
In d dimensions noise of length r moves a point by only about r / sqrt(d) along the normal of a boundary, so that its answer is
nearly the point's own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.distances import distance
from robustbox.protocol import Task
from robustbox.records import inside

from .balls import fit

Guard = Literal["jitter", "skip", "off"]

SKETCH = 256
"""Numbers a row is remembered by."""
LEAST, MOST = 1 / 255, 1 / 8
"""Range of the spacing a pixel, once some row was refused; times sqrt(d) in length."""
OUT, IN = 1.25, 0.98
"""By how much the spacing grows when a guarded row is refused, and shrinks when one is answered: at balance 8 % are refused."""
MARGIN = 1.02


class History:
    """Sketches of rows, from which l2 distances can be told up to about 6 % (count sketch, Charikar et al. 2002).

    Args:
        like: an image [C,H,W], for shape and device.
        seed: of the sketch.
    """

    def __init__(self, like: Tensor, seed: int) -> None:
        generator = torch.Generator(like.device).manual_seed(seed)
        d = like.numel()
        self._bucket = torch.randint(SKETCH, (d,), generator=generator, device=like.device)
        self._sign = torch.randint(2, (d,), generator=generator, device=like.device) * 2.0 - 1
        self._rows = torch.empty(64, SKETCH, device=like.device)
        self._n = 0

    def sketch(self, rows: Tensor) -> Tensor:
        """[n,C,H,W] -> [n,SKETCH]."""
        flat = rows.flatten(1) * self._sign
        return flat.new_zeros(len(flat), SKETCH).index_add_(1, self._bucket, flat)

    def add(self, sketches: Tensor) -> None:
        """Remember rows."""
        stop = self._n + len(sketches)
        if stop > len(self._rows):
            room = self._rows.new_empty(max(stop, 2 * len(self._rows)), SKETCH)
            room[: self._n] = self._rows[: self._n]
            self._rows = room
        self._rows[self._n : stop] = sketches
        self._n = stop

    def nearest(self, sketches: Tensor) -> Tensor:
        """Distance l2 of each row to the nearest that is remembered, [n]; inf where there is none."""
        if not self._n:
            return sketches.new_full((len(sketches),), torch.inf)
        return torch.cdist(sketches, self._rows[: self._n]).amin(dim=1)


class Keeper:
    """Keeps rows apart that cannot be drawn again.

    How far (`length`, in l2) it learns from what is refused; 0 as long as nothing was.

    Args:
        task: the task of the rows.
        guard: what becomes of a row that is too near to an earlier one: jitter, skip or off.
    """

    def __init__(self, task: Task, guard: Guard) -> None:
        self.length = 0.0
        self._task, self._guard, self._unit = task, guard, math.sqrt(task.image.numel())
        seed = task.generator.initial_seed() ^ 1  # the attack's stream stays its own
        self._generator = torch.Generator(task.image.device).manual_seed(seed)
        self._history = History(task.image, seed)

    def place(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Rows [n,C,H,W], moved where they must be, and the places of those that may be sent."""
        everyone = list(range(len(rows)))
        if not self.length or self._guard == "off":
            return rows, everyone
        near = self._history.nearest(self._history.sketch(rows)).tolist()
        if self._guard == "skip":
            return rows, [i for i in everyone if near[i] >= self.length]
        moved = [self._moved(rows[i : i + 1], near[i]) if near[i] < self.length else rows[i : i + 1] for i in everyone]
        return torch.cat(moved), everyone

    def note(self, rows: Tensor, answered: Tensor, kind: Literal["settled", "drawn", "placed"]) -> None:
        """Remember rows [n,C,H,W] that were sent, and learn from which of them were answered (bool [n] on the host).

        Args:
            kind: of the rows: drawn at the scale at which a search has just settled, drawn at any other, or from `place`.
        """
        if self._guard == "off":
            return
        sketches = self._history.sketch(rows)
        if kind == "settled" and answered.any():
            near = self._history.nearest(sketches)
            self.length = float(near[answered.to(near.device)].median())
        elif kind == "placed" and (self.length or not answered.all()):
            for near, passed in zip(self._history.nearest(sketches).tolist(), answered.tolist(), strict=True):
                if not passed:
                    self.length = min(max(self.length * OUT, LEAST * self._unit), MOST * self._unit)
                elif near < self.length * OUT:
                    self.length *= IN
        self._history.add(sketches)

    def _moved(self, row: Tensor, near: float) -> Tensor:
        """A row [1,C,H,W] moved by the length that it lacks."""
        return moved(self._task, row, math.sqrt((MARGIN * self.length) ** 2 - near**2), self._generator)


def moved(task: Task, row: Tensor, length: float, generator: torch.Generator) -> Tensor:
    """A row [1,C,H,W] in the box, moved by white noise of an l2 length; from the ball of an epsilon into it."""
    noise = torch.randn(row.shape, generator=generator, device=row.device)
    elsewhere = row + length * F.normalize(noise.flatten(), dim=0).view_as(row)
    if task.epsilon is not None and inside(float(distance(row - task.image, task.norm)), task.epsilon):
        return fit(task, elsewhere - task.image)
    return elsewhere.clamp_(0, 1)
