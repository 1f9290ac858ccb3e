"""HopSkipJump (Chen, Jordan, Wainwright: HopSkipJumpAttack: A Query-Efficient Decision-Based Attack, IEEE S&P 2020).

From a boundary point x_t at distance R_t = |x_t - x| (l2 or linf) of the source x, iteration t = 1, 2, ... (algorithm 2)

1. estimates the direction into the adversarial side from B_t = floor(n0 sqrt(t)) noisy queries of l2 length delta_t, the mean
   of the answers subtracted (eq. 16): v for l2, scaled to length 1; sign(v) for linf;
2. steps to x_t + xi v, from xi = R_t / sqrt(t) on, halved until the point reaches the goal (geometric progression);
3. comes back to the boundary by bisection: for l2 on the line to x, for linf over the radius r of clip(., x - r, x + r).

Noise and tolerance come from one number theta (section III-C): delta_t = sqrt(d) theta R_t for l2 and d theta R_t for linf in d
dimensions, and bisection ends at theta of the distance.

Query cost of iteration t: B_t + s + about ceil(log2(1 / theta)) rows, 11 at 3 x 32 x 32, where s is 1 + the halvings, at most
`STEPS`; the start search (`starts.find_start`) and one bisection come first.

Deviations from the paper's algorithm:

- The start is a bounded search over patterns, flat images, the pool and noise instead of unbounded white noise.
- theta = 1 / (20 sqrt(d)) by default, so that noise is a twentieth of the distance; the paper's is d^-1.5 for l2 and d^-2 for
  linf, which drowns in rounding and costs a bisection twice as many rows. n0 = 30 instead of 100: better up to 2,000 rows.
- A step that no halving saves is not taken. The step search is bounded.
- Noise is at least 1.3 grey levels a pixel where rows are rounded.
- Where answers are stochastic, every iteration first asks x_t again and steps outward while it fails (`moves.hold`).

The knob `radius` is delta_t; rows of estimates can be drawn again. A step that is refused is lengthened, not halved. Where the
knob is set, noise is centred further out (`Lift`), so that about half of the rows reach the goal.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Answer, Attack, Knob, Norm, Query, Search, Task

from .cgba import LEVELS_OF_NOISE, NOISE_LENGTH
from .moves import bisect_arc, bisect_line, estimate_normal, hold, radius_knob
from .starts import find_start
from .subspaces import Sampler, sampler

STEPS = 12
"""Rows of a step search: the last of its halvings is 1/2048 of the first step."""
FURTHER = 1.5
"""By how much a refused step is lengthened."""
PART = 10
"""Rows after which noise that a wrapper sets is centred anew."""
LOPSIDED, LOWEST = 0.25, 0.05
"""A share of rows below which noise is centred further out; the least way out, in lengths of the noise."""


@dataclass(frozen=True)
class HopSkipJump(Attack):
    """HopSkipJump: gradient estimates from labels at the boundary. Minimises l2 or linf.

    Args:
        n0: rows of the first estimate; estimate t takes floor(n0 sqrt(t)).
        theta: tolerance of bisections over the distance, which also sets the noise; default: 1 / (20 sqrt(d)).
    """

    name: ClassVar[str] = "hop-skip-jump"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    knobs: ClassVar[tuple[str, ...]] = ("radius",)
    takes_start: ClassVar[bool] = True

    n0: int = 30
    theta: float | None = None

    def __post_init__(self) -> None:
        if self.n0 < 1:
            raise InputError(f"n0 must be at least 1, got {self.n0}")
        if self.theta is not None and not 0 < self.theta < 1:
            raise InputError(f"theta must be between 0 and 1, got {self.theta}")

    def search(self, task: Task) -> Search:
        sample, knob, lift = self._sampler(task), radius_knob(task.image), Lift()
        point = yield from find_start(task)
        if point is None:
            return
        point = yield from self._to_boundary(task, point)
        for t in count(1):
            point = yield from hold(task, point)
            radius = float(distance(point - task.image, task.norm))
            if radius == 0:
                return
            sigma, tolerance = self._scales(task, radius)
            search_cost = 1 + math.ceil(math.log2(radius / tolerance))
            rows = max(min(int(self.n0 * math.sqrt(t)), task.remaining - search_cost), 1)
            normal = yield from self._normal(task, point, sigma, rows, sample, knob, lift)
            end = yield from self._step(task, point, normal, radius / math.sqrt(t))
            if end is not None:
                point = yield from self._to_boundary(task, end)

    def _normal(
        self, task: Task, point: Tensor, sigma: float, rows: int, sample: Sampler, knob: Knob, lift: Lift
    ) -> Generator[Query, Answer, Tensor]:
        """An estimate: of all rows around the point, or, where a wrapper sets the noise, of parts that `lift` centres."""
        total = torch.zeros_like(point)
        while rows > 0:
            length = knob.value
            part, centre = lift.part(rows, length), lift.centre(task, point, length)
            normal, share = yield from estimate_normal(task, centre, sigma, part, sample, knob, centred=True)
            lift.follow(share, length)
            total, rows = total + normal, rows - part
        return total

    def _sampler(self, task: Task) -> Sampler:
        """Where the noise of estimates is drawn."""
        channels, height, width = task.image.shape
        return sampler("full", (channels, height, width), 1, task.generator)

    def _scales(self, task: Task, radius: float) -> tuple[float, float]:
        """Noise a pixel and tolerance of bisection (in the task's norm) at a distance from the source."""
        root = math.sqrt(task.image.numel())
        theta = self.theta or NOISE_LENGTH / root
        least = LEVELS_OF_NOISE / (task.levels - 1) if task.levels else 0.0
        if task.norm == "l2":
            sigma = max(theta * radius, least)
            return sigma, min(sigma, radius / 2)
        return max(root * theta * radius, least), min(max(theta * radius, least / 4), radius / 2)

    def _to_boundary(self, task: Task, end: Tensor) -> Generator[Query, Answer, Tensor]:
        """The last point [1,C,H,W] found adversarial on the way from `end` [1,C,H,W] to the source."""
        radius = float(distance(end - task.image, task.norm))
        if radius == 0:
            return end
        tolerance = self._scales(task, radius)[1]
        if task.norm == "l2":
            return (yield from bisect_line(task, end, tolerance))

        def shrunk(r: float) -> Tensor:
            return end.clamp(task.image - r, task.image + r)

        r = yield from bisect_arc(task, shrunk, radius, 0.0, tolerance)
        return shrunk(r) if r < radius else end

    def _step(self, task: Task, point: Tensor, normal: Tensor, xi: float) -> Generator[Query, Answer, Tensor | None]:
        """A step along the estimate that stays adversarial [1,C,H,W], or None where none was found."""
        return (yield from step(task, point, normal, xi))


@dataclass(slots=True)
class Lift:
    """How far out on the ray from the image noise is centred that leaves the goal: `height`, in lengths of it.

    Noise of length r in d dimensions leaves a region that bends with radius R by about r^2 / 2R, and goes r / sqrt(d) to either
    side along the normal. Where the former is more, hardly a row reaches the goal, and an estimate learns nothing.
    """

    height: float = 0.0

    def part(self, rows: int, length: float | None) -> int:
        """How many of so many rows to ask before noise is centred anew: all, where no wrapper sets its length (None)."""
        return rows if length is None else min(PART, rows)

    def centre(self, task: Task, point: Tensor, length: float | None) -> Tensor:
        """Where noise of a length is centred for a boundary point [1,C,H,W]; the point itself for None."""
        if length is None or not self.height:
            return point
        ray = point - task.image
        far = float(torch.linalg.vector_norm(ray))
        return torch.add(point, ray, alpha=self.height * length / far).clamp_(0, 1)

    def follow(self, share: float, length: float | None) -> None:
        """Learn from the share of rows that reached the goal under noise of a length; nothing from NaN."""
        if length is None:
            return
        if share < LOPSIDED:
            self.height = min(max(2 * self.height, LOWEST), 1.0)
        elif share > 1 - LOPSIDED:
            self.height = self.height / 2 if self.height > LOWEST else 0.0


def step(task: Task, point: Tensor, normal: Tensor, xi: float) -> Generator[Query, Answer, Tensor | None]:
    """A step of length xi along an estimate that stays adversarial [1,C,H,W], or None where none was found."""
    v = normal.sign() if task.norm == "linf" else normal / torch.linalg.vector_norm(normal).clamp_min(1e-12)
    for _ in range(STEPS):
        end = torch.add(point, v, alpha=xi).clamp_(0, 1)
        answer = yield Query(end, "step")
        if task.reached_any(answer):
            return end
        xi *= FURTHER if answer.status.any() else 0.5
    return None
