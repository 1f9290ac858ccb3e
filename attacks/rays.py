"""RayS (Chen, Gu: RayS: A Ray Searching Method for Hard-label Adversarial Attack, KDD 2020; code: github.com/uclaml/RayS).

Perturbations are corners of the ball: a direction d in {-1, +1}^n, of which only the radius at which its ray enters the
goal counts,

    g(d) = min { r : clip(x + r d) reaches the goal },

and g is minimised over directions without a gradient. Stage s = 0, 1, 2, ... cuts the n values, in the order of memory, into
2^s blocks and tries for one block after the other whether d with this block's signs flipped is better than the best so far:
first by the fast check, one row at the best radius r; only where this reaches the goal is the new radius searched. Once
blocks are single values, passes over them are repeated, until one changes nothing and the next would be the same rows.

Query cost: 1 row a block, and for each block that improves about 2 log2(1 + gain / tolerance) + 1 more. Stage s has 2^s blocks.
Black boxes that are stochastic are asked again for the best point before each block: at least 1 row more.

Deviations from the paper's algorithm:

- The tolerance of radii is not constant (0.001 sqrt(1/n) there) but follows the blocks: `tolerance` times what flipping a
  share 2^-s of the signs may gain, 2^-s r. The fast check is asked at r less the tolerance, so that every block that passes
  is an improvement worth its search.
- After the first, a search goes inwards from r by steps that double, and bisects the last one, where the paper bisects
  [0, r]: most gains are small.
- With an epsilon, the first row after a passed check is asked at that radius: it decides, where it lies below r.
- Where no direction of the first three stages reached the goal at any radius, signs of blocks are drawn at random until one
  does: the paper goes on to flip one block at a time of its first direction, all up.
- Rows that are rounded to grey levels are dithered (`levels.on_levels`): else r could only fall by a whole level at once,
  which no small block achieves.

The knob `block` is the least number of values that a step flips (whole; n / 1024 to n / 2): a block then begins where the
stage says, but is that long. A refused step is drawn again as a block of the same length at a random place; refused for
good, it is left for the next block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Answer, Attack, Knob, Norm, Query, Search, Task

from .balls import whole
from .levels import dither, on_levels
from .moves import bisect_arc, hold

PATIENCE = 3
"""Stages in which the first success is looked for as in the paper."""
LEAST = 1e-6
"""The least tolerance of a radius: about what float32 resolves."""


@dataclass(frozen=True)
class RayS(Attack):
    """RayS: flip the signs of ever smaller blocks of a linf perturbation. Minimises linf, knows labels only.

    Args:
        tolerance: a radius is searched to this share of what a block of the current size may gain.
    """

    name: ClassVar[str] = "rays"
    norms: ClassVar[tuple[Norm, ...]] = ("linf",)
    targeted: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("block",)

    tolerance: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must be between 0 and 1, got {self.tolerance}")

    def search(self, task: Task) -> Search:
        yield from turn_over(task, self.tolerance)


def turn_over(task: Task, share: float, once: bool = False) -> Generator[Query, Answer, Tensor]:
    """The search of `RayS`: flip the signs of ever smaller blocks.

    Args:
        share: its `tolerance`.
        once: end when single values were turned over once; else when turning them over no longer helps.

    Returns:
        The nearest point found [1,C,H,W], when nothing is left to gain.

    Cost: that of `RayS`; with `once` at most 3 rows a value once something reached the goal, and those of its improvements.
    """
    ray = _Ray(task)
    size = task.image.numel()
    for stage in count():
        length, idle = math.ceil(size / 2 ** min(stage, 60)), True
        for start in range(0, size, length):
            if ray.found:
                yield from ray.hold()
            tolerance = max(share * ray.radius * length / size, LEAST)
            if tolerance > ray.radius:
                return ray.row(ray.radius)  # nothing is left to gain
            answer = yield ray.propose(start, length, ray.radius - tolerance)
            if task.reached_any(answer):
                yield from ray.accept(tolerance)
                idle = False
            idle &= not answer.status.any()
        if ray.found and length == 1 and (once or (idle and ray.settled)):
            break
    return ray.row(ray.radius)


class _Ray:
    """The best direction of a search and its radius; the flip that is tried next.

    Attributes:
        signs: the best direction, -1 or +1, [C,H,W].
        radius: at which it is known to reach the goal; before any did (`found`), the whole width of the box.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._dither = dither(task)
        self.signs, self.radius, self.found = torch.ones_like(task.image), 1.0, False
        self._flipped, self._length, self._at = self.signs, 0, self.radius
        size = task.image.numel()
        self._knob = Knob("block", math.ceil(size / 1024), math.ceil(size / 2), self._draw, integer=True)

    @property
    def settled(self) -> bool:
        """Whether the same blocks are answered alike: after a pass that changed nothing the next is the same rows."""
        return not self._task.stochastic and self._knob.value is None

    def row(self, radius: float) -> Tensor:
        """The point of the best direction at a radius [1,C,H,W]."""
        return self._row(self.signs, radius)

    def propose(self, start: int, length: int, radius: float) -> Query:
        """Ask for the best direction with a block of its signs flipped, at a radius."""
        self._length = max(length, int(self._knob.value or 0))
        self._at = radius
        lost = not self.found and length * 2**PATIENCE <= self.signs.numel()
        self._flipped = self._anywhere(self._length) if lost else self._flip(start, self._length)
        return Query(self._row(self._flipped, radius), "step", self._redraw, (self._knob,))

    def accept(self, tolerance: float) -> Generator[Query, Answer, None]:
        """Take over what was proposed, for it reached the goal, and search its radius."""
        self.signs = self._flipped
        ball = within(self._task)
        bad = 0.0
        good = self._at
        if ball is not None and ball < good:
            answer = yield Query(self.row(ball), "line")
            if self._task.reached_any(answer):
                good = ball
            elif not answer.status.any():
                bad = ball
        if self.found:
            good = yield from descend(self._task, self.row, good, bad, tolerance)
        else:
            good = yield from bisect_arc(self._task, self.row, good, bad, tolerance)
        self.radius, self.found = good, True

    def hold(self) -> Generator[Query, Answer, None]:
        """Ask for the best point again where answers are stochastic; while it fails, stand further out."""
        if self._task.stochastic:
            image, point = self._task.image, self.row(self.radius)
            still = point.equal(image[None])  # rounded or clipped to the image: no way leads on from there
            held = yield from hold(self._task, point, self.row(1.0) if still else None)
            near, far = (distance(x - image, "linf") for x in (point, held))
            self.radius = (float(far) or 1.0) if still else min(self.radius * float(far / near), 1.0)

    def _row(self, signs: Tensor, radius: float) -> Tensor:
        return on_levels(self._task, radius * signs, self._dither)[None]

    def _flip(self, start: int, length: int) -> Tensor:
        flat = self.signs.flatten().clone()
        flat[start : start + length].neg_()
        return flat.view_as(self.signs)

    def _anywhere(self, length: int) -> Tensor:
        """The best direction with a block of this length flipped at a random place; random signs of blocks if there is none."""
        if not self.found:
            blocks = math.ceil(self.signs.numel() / length)
            noise = torch.rand(blocks, generator=self._task.generator, device=self.signs.device).sub_(0.5).sign_()
            return noise.repeat_interleave(length)[: self.signs.numel()].view_as(self.signs)
        places = max(self.signs.numel() - length, 0) + 1
        generator = self._task.generator
        return self._flip(int(torch.randint(places, (1,), generator=generator, device=generator.device)), length)

    def _redraw(self, positions: list[int]) -> Tensor:
        self._flipped = self._anywhere(max(self._length, int(self._knob.value or 0)))
        return self._row(self._flipped, self._at)

    def _draw(self, value: float, n: int) -> Tensor:
        return torch.cat([self._row(self._anywhere(int(value)), self._at) for _ in range(n)])


def descend(
    task: Task, path: Callable[[float], Tensor], good: float, bad: float, tolerance: float
) -> Generator[Query, Answer, float]:
    """The least parameter found to reach the goal on a path that does at `good` and not at `bad` < good.

    Steps from `good` inwards that begin at the tolerance and double, then a bisection of the last one. Cost: about
    2 log2(1 + gain / tolerance) + 1 rows; fewer when a row is not answered.
    """
    step = tolerance
    while good - step > bad:
        answer = yield Query(path(good - step), "line")
        if task.reached_any(answer):
            good, step = good - step, 2 * step
        elif answer.status.any():
            return good
        else:
            bad = good - step
    return (yield from bisect_arc(task, path, good, bad, tolerance))


def within(task: Task) -> float | None:
    """The linf radius that rows may use: epsilon, rounded down to whole grey levels where rows are rounded."""
    return None if task.epsilon is None else whole(task, task.epsilon)
