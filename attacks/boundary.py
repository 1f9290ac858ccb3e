"""The Boundary Attack (Brendel, Rauber, Bethge: Decision-Based Adversarial Attacks, ICLR 2018).

A random walk along the boundary. At an adversarial point y at l2 distance R of the source x a proposal is (figure 2)

1. orthogonal: y + delta R e, with e a Gaussian direction orthogonal to y - x, of length 1; shrunk back to the sphere of
   radius R around x: s = x + (y + delta R e - x) / sqrt(1 + delta^2);
2. towards the source: x + (1 - epsilon) (s - x);

and the walk goes where a proposal reaches the goal. Both steps are adapted by success ratios: delta by that of bare orthogonal
steps, of which every `period`-th round asks one, epsilon by that of proposals. A success multiplies a step by
exp(rate (1 - p)), a failure by exp(-rate p), which holds the ratio at p.

Query cost: `batch` rows a round, `batch` rows more in every `period`-th; the start search (`starts.find_start`) and one
bisection of at most 7 rows come first.

Deviations from the paper's algorithm:

- The start is a bounded search over patterns, flat images, the pool and noise, and a line search, instead of white noise.
- Ratios are held at 0.28 (delta) and 0.12 (epsilon) instead of "about 50 %" and an unstated one: on a flat boundary with a
  Gaussian component u of e, where a proposal succeeds when a delta u > delta^2 / 2 + epsilon, they make the progress per row
  epsilon P(success) largest. There no ratio reaches 50 %: delta would fall for ever.
- Steps are adapted after every row instead of after a window of rows.
- Of a round's proposals the nearest success is taken. More than one a round cost rows (they start from the same point).
- Where answers are stochastic, every `period`-th round first asks y again and steps outward while it fails (`moves.hold`).

The knobs are `orthogonal` (delta) and `source` (epsilon); all rows of the walk can be drawn again. A refused row counts as a
success in the ratios: too small a step is what is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, Attack, Knob, Norm, Search, Task

from .moves import bisect_line, hold
from .noise import Drawn
from .starts import find_start

ORTHOGONAL, SOURCE = 0.28, 0.12
"""Success ratios at which the two steps are held."""
LIMITS = {"orthogonal": (1e-4, 1.0), "source": (1e-6, 0.5)}
"""Within which the steps are adapted, and wrappers may set them."""
START = 0.01
"""Tolerance of the first bisection over the distance."""


@dataclass(frozen=True)
class Boundary(Attack):
    """Boundary Attack: a random walk along the boundary. Minimises l2, knows labels only.

    Args:
        orthogonal: first step along the sphere around the source, over the distance.
        source: first step towards the source, over the distance.
        rate: how fast steps are adapted, as the exponent of the module's formula.
        period: every so many rounds orthogonal steps are asked by themselves.
        batch: proposals a round.
    """

    name: ClassVar[str] = "boundary"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    knobs: ClassVar[tuple[str, ...]] = ("orthogonal", "source")
    takes_start: ClassVar[bool] = True

    orthogonal: float = 0.1
    source: float = 0.01
    rate: float = 0.3
    period: int = 10
    batch: int = 1

    def __post_init__(self) -> None:
        for option, (low, high) in LIMITS.items():
            if not low <= getattr(self, option) <= high:
                raise InputError(f"{option} must be between {low:g} and {high:g}, got {getattr(self, option)}")
        if not self.rate > 0:
            raise InputError(f"rate must be positive, got {self.rate}")
        for name in ("period", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    def search(self, task: Task) -> Search:
        point = yield from find_start(task)
        if point is None:
            return
        point = yield from bisect_line(task, point, START * float(torch.dist(point, task.image)))
        walk = _Walk(task, point, self)
        for i in count():
            if i % self.period == 0:
                walk.stand((yield from hold(task, walk.point)))
            if walk.distance == 0:
                return
            if i % self.period == 0:
                bare = Drawn(walk.sphere(self.batch), lambda _: walk.sphere(1))
                walk.delta.adapt(task, (yield bare.query("probe", (walk.delta.knob,))))
            proposals = Drawn(walk.proposals(self.batch), lambda _: walk.proposals(1))
            answer = yield proposals.query("step", (walk.delta.knob, walk.epsilon.knob))
            walk.epsilon.adapt(task, answer)
            if task.reached_any(answer):
                walk.stand(walk.nearest(proposals.rows[task.reached(answer).to(point.device)]))


class _Step:
    """The length of a step: a knob, and in its absence the value that holds a success ratio."""

    def __init__(
        self, name: str, draw: Callable[[float, int], Tensor], value: float, ratio: float, rate: float
    ) -> None:
        self.knob = Knob(name, *LIMITS[name], draw)
        self._value, self._ratio, self._rate = value, ratio, rate

    def __call__(self) -> float:
        return self._value if self.knob.value is None else self.knob.value

    def adapt(self, task: Task, answer: Answer) -> None:
        """Lengthen for every success and refusal, shorten for every failure."""
        for longer in (task.reached(answer) | (answer.status != ANSWERED)).tolist():
            self._value *= math.exp(self._rate * (longer - self._ratio))
        self._value = min(max(self._value, self.knob.low), self.knob.high)


class _Walk:
    """Where the walk stands, and what it proposes from there."""

    def __init__(self, task: Task, point: Tensor, attack: Boundary) -> None:
        self.task = task
        self.delta = _Step("orthogonal", self._along, attack.orthogonal, ORTHOGONAL, attack.rate)
        self.epsilon = _Step("source", self._towards, attack.source, SOURCE, attack.rate)
        self.stand(point)

    def stand(self, point: Tensor) -> None:
        """Go to a point [1,C,H,W]."""
        self.point, self.ray = point, point - self.task.image
        self.distance = float(torch.linalg.vector_norm(self.ray))

    def sphere(self, n: int) -> Tensor:
        """n orthogonal steps [n,C,H,W]."""
        return self._along(self.delta(), n)

    def proposals(self, n: int) -> Tensor:
        """n orthogonal steps, each followed by one towards the source [n,C,H,W]."""
        return self._towards(self.epsilon(), n)

    def nearest(self, rows: Tensor) -> Tensor:
        """The row [1,C,H,W] of rows [n,C,H,W] that is nearest to the source."""
        if len(rows) == 1:
            return rows
        best = torch.linalg.vector_norm((rows - self.task.image).flatten(1), dim=1).argmin()
        return rows[best][None]

    def _along(self, delta: float, n: int) -> Tensor:
        return self._clipped(self._sphere(n, delta))

    def _towards(self, epsilon: float, n: int) -> Tensor:
        return self._clipped(self._sphere(n, self.delta()).mul_(1 - epsilon))

    def _sphere(self, n: int, delta: float) -> Tensor:
        """s - x of the module's docstring [n,C,H,W], not clipped."""
        ray = self.ray.flatten()
        noise = torch.randn(n, ray.numel(), generator=self.task.generator, device=ray.device)
        noise -= torch.outer(noise @ ray / self.distance**2, ray)
        lengths = torch.linalg.vector_norm(noise, dim=1, keepdim=True)
        lengths.clamp_min_(torch.finfo(noise.dtype).tiny)  # 0 where an image is one value
        noise *= (delta * self.distance) / lengths
        return noise.add_(ray).div_(math.sqrt(1 + delta**2)).view(-1, *self.task.image.shape)

    def _clipped(self, deltas: Tensor) -> Tensor:
        return deltas.add_(self.task.image).clamp_(0, 1)
