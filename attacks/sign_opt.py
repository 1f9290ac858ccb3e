"""Sign-OPT (Cheng, Singh, Chen, Chen, Liu, Hsieh: Sign-OPT: A Query-Efficient Hard-label Adversarial Attack, ICLR 2020; code:
github.com/cmhcbb/attackbox, where linf was added).

An adversarial point is x + g(theta) theta / |theta|: a direction theta and the distance at which its ray enters the goal,

    g(theta) = min { lambda > 0 : clip(x + lambda theta / |theta|) reaches the goal },

in the norm of the task. g is minimised by gradient descent, theta <- theta - eta G, with a gradient from signs alone,

    G = 1/Q sum_j sign(g(theta + beta u_j) - g(theta)) u_j,   u_j Gaussian with |u_j| = 1,   |theta| = 1,

each sign of which is one row: -1 where the point at distance g(theta) in the direction theta + beta u_j reaches the goal.
The step eta doubles as long as g falls; where its first value already failed, it is quartered until g falls; at most 30 steps
are tried. Where eta has become less than 1e-4, it is 1 again and beta a tenth.

Query cost of an iteration: Q rows, 1 row a step tried, and for each step that shortens the distance about
2 log2(1 + gain / tolerance) + 1 more; the tolerance is beta g / (2 sqrt(n)) for images of n values. The start search
(`starts.find_start`) and a bisection of log2(2 sqrt(n) / beta) rows come first. Black boxes that are stochastic are asked
again for the best point in each iteration: at least 1 row more.

Deviations from the paper's algorithm:

- The start is the search that other attacks here use, repeated until it finds one, instead of 100 random directions with a
  line search each; targeted as in the paper from images of the target class.
- A step is first asked at the distance that it has to beat, and its own distance is searched only where it does. The
  authors' code follows every step outwards or inwards, a hundredth of the distance a row.
- Probes are asked at g(theta) times the mean length of the theta + beta u_j instead of at g(theta): at that distance they
  fall short of a flat boundary, in l2 by beta^2 / 2, and most of them would tell nothing unless beta is very small.
- So beta can be 0.03 in l2 and 0.3 in linf instead of 0.001, and the tolerance, which follows it, coarser. Where rows are
  rounded, the noise of a row is no less than 1.3 grey levels a pixel.
- In linf a step is cut off at the cube of theta, in which most values of a start are at the edge. Scaled to fit in, as in the
  authors' code, the one value that it moves furthest outwards makes all others smaller, and hardly a step gains.
- An estimate takes at most an eighth of the rows that are left, or 10: with 200 whatever the budget, there was no step at 200
  queries, and one at 500.
- SVM-OPT is left out: where n is much larger than Q, the u_j are nearly orthogonal and its solution is nearly G.

The knob `radius` is the l2 length of g(theta) beta u_j (`moves.radius_knob`); refused probes are drawn again. After a refused
step, eta is doubled.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, Attack, Knob, Norm, Query, Search, Task

from .moves import ROW_BYTES, bisect_arc, hold, radius_knob
from .noise import Noise
from .rays import descend
from .starts import find_start

LEVELS_OF_NOISE = 1.3
"""Least noise a pixel in grey levels where rows are rounded: below one level, rounding hides it."""
TRIES = 30
"""Steps that are tried in one iteration."""
LEAST_STEP, LEAST_BETA = 1e-4, 1e-5
SHARE, LEAST_PROBES = 8, 10
"""An estimate takes at most one part in so many of the rows that are left, but may always take a few."""
BETA: dict[Norm, float] = {"l2": 0.03, "linf": 0.3}
LEAST = 1e-6
"""Of distances: about what float32 resolves."""


@dataclass(frozen=True)
class SignOPT(Attack):
    """Sign-OPT: descend on the distance to the boundary as a function of direction. Minimises l2 or linf, knows labels only.

    Args:
        probes: rows of a gradient estimate, Q; near the end of the budget fewer.
        beta: noise of a probe, relative to the direction; default: 0.03 in l2, 0.3 in linf.
        step: the first step eta.
    """

    name: ClassVar[str] = "sign-opt"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    knobs: ClassVar[tuple[str, ...]] = ("radius",)
    takes_start: ClassVar[bool] = True

    probes: int = 200
    beta: float | None = None
    step: float = 0.2

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise InputError(f"probes must be at least 1, got {self.probes}")
        if self.beta is not None and not 0 < self.beta < 1:
            raise InputError(f"beta must be between 0 and 1, got {self.beta}")
        if not self.step > 0:
            raise InputError(f"step must be positive, got {self.step}")

    def search(self, task: Task) -> Search:
        point = yield from find_start(task)
        while point is None:
            point = yield from find_start(task, again=True)
        ray = _Ray(task, point - task.image)
        step, beta = self.step, self.beta or BETA[task.norm]
        ray.radius = yield from bisect_arc(task, ray.row, ray.radius, 0.0, ray.tolerance(beta))
        knob = radius_knob(task.image)
        while ray.radius > LEAST:
            if task.stochastic:
                held = yield from hold(task, ray.row(ray.radius))
                ray = _Ray(task, held - task.image)
            downhill = yield from self._estimate(ray, beta, knob)
            ray, step = yield from self._descend(ray, downhill, step, ray.tolerance(beta))
            if step < LEAST_STEP:
                step, beta = 1.0, max(beta / 10, LEAST_BETA)

    def _estimate(self, ray: _Ray, beta: float, knob: Knob) -> Generator[Query, Answer, Tensor]:
        """-G of the module's docstring [1,C,H,W], over the rows that were answered."""
        task = ray.task
        total, answered = torch.zeros_like(ray.theta), 0
        chunk = max(ROW_BYTES // (task.image.numel() * task.image.element_size()), 1)
        count = min(self.probes, max(task.remaining // SHARE, LEAST_PROBES))
        for start in range(0, count, chunk):
            probes = _Probes(ray, beta, knob, min(chunk, count - start))
            answer = yield Query(probes.draw(), redraw=probes.redraw, knobs=(knob,))
            known = answer.status == ANSWERED
            signs = (2 * task.reached(answer).float() - known.float()).to(total.device)
            total += (signs @ probes.directions().flatten(1)).view_as(total)
            answered += int(known.sum())
            del probes
        return total / max(answered, 1)

    @staticmethod
    def _descend(
        ray: _Ray, downhill: Tensor, step: float, tolerance: float
    ) -> Generator[Query, Answer, tuple[_Ray, float]]:
        """The shortest ray found along theta + eta downhill, or the ray itself, and the eta to begin with next time."""
        task, best = ray.task, ray
        growth = 2.0
        for _ in range(TRIES):
            moved = ray.theta + step * downhill
            other = _Ray(task, moved.clamp_(-1, 1) if task.norm == "linf" else moved)
            radius = best.radius - tolerance
            answer = yield Query(other.row(radius), "step")
            refused = bool(answer.status.any())
            if task.reached_any(answer):
                other.radius = yield from descend(task, other.row, radius, 0.0, tolerance)
                best = other
            elif refused or best is not ray:
                return best, 2 * step if refused else step
            else:
                growth = 0.25
            if growth < 1 and best is not ray:
                break
            step *= growth
        return best, step


class _Ray:
    """A direction, and a distance at which its ray reaches the goal.

    Args:
        task: the image, the norm and the random stream.
        delta: any point of the ray less the image [1,C,H,W], not 0.

    Attributes:
        theta: the direction, of length 1 in the norm.
        radius: at first that of delta.
    """

    def __init__(self, task: Task, delta: Tensor) -> None:
        self.task = task
        self.radius = float(distance(delta, task.norm))
        self.theta = delta / max(self.radius, LEAST)

    def row(self, radius: float) -> Tensor:
        """The point at a distance [1,C,H,W], in the box."""
        return torch.add(self.task.image, self.theta, alpha=radius).clamp_(0, 1)

    def tolerance(self, beta: float) -> float:
        """To what share of what noise of length beta changes a distance by, radii are searched."""
        return beta * self.radius / (2 * math.sqrt(self.theta.numel()))


class _Probes:
    """The rows of one query for a gradient, and their directions u [size,C,H,W], each of length 1 in the norm."""

    def __init__(self, ray: _Ray, beta: float, knob: Knob, size: int) -> None:
        self._ray, self._beta, self._knob = ray, beta, knob
        self._noise = Noise(ray.task.generator, self._drawn, size, ray.theta)
        knob.draw = lambda radius, n: self._rows(self._drawn(n), radius)

    def draw(self) -> Tensor:
        """All rows, for the first time."""
        return self._rows(self._noise.draw(), self._knob.value)

    def redraw(self, positions: list[int]) -> Tensor:
        """Fresh rows for these positions, at the scale that is now in force (`Query.redraw`)."""
        return self._rows(self._noise.renew(positions), self._knob.value)

    def directions(self) -> Tensor:
        """Those of the rows that were asked last."""
        return self._noise.get()

    def _drawn(self, n: int) -> Tensor:
        generator = self._ray.task.generator
        noise = torch.randn(n, *self._ray.theta.shape[1:], generator=generator, device=generator.device)
        return noise.div_(_lengths(noise, self._ray.task.norm))

    def _rows(self, directions: Tensor, radius: float | None) -> Tensor:
        """Rows at the ray's distance times the mean length of theta + beta u; radius: l2 length of the noise, None: beta's."""
        ray, levels = self._ray, self._ray.task.levels
        scale: Tensor | float = self._beta
        if radius is not None or levels:
            lengths = ray.radius * _lengths(directions, "l2")
            if radius is not None:
                scale = radius / lengths
            elif levels:
                least = LEVELS_OF_NOISE / (levels - 1) * math.sqrt(ray.theta.numel())
                scale = (least / lengths).clamp_(min=self._beta)
        rows = ray.theta + scale * directions
        lengths = _lengths(rows, ray.task.norm)
        return rows.mul_(ray.radius * lengths.mean() / lengths).add_(ray.task.image).clamp_(0, 1)


def _lengths(rows: Tensor, norm: Norm) -> Tensor:
    """Norms of rows [n,C,H,W], never 0, in their shape [n,1,1,1]."""
    return distance(rows, norm).clamp_(min=LEAST).to(rows.dtype).view(-1, 1, 1, 1)
