"""GeoDA (Rahmati, Moosavi-Dezfooli, Frossard, Dai: GeoDA: a geometric framework for black-box adversarial attacks, CVPR 2020).

Where the boundary is a plane with normal w, the nearest adversarial of the source x in the norm p lies in one known direction

    l2  v = w / |w|        linf  v = sign(w),

so that only w has to be learnt (eq. 4-6). Iteration t = 0, 1, ..., T - 1, from the boundary point x_t,

1. estimates w from N_t noisy rows around x_t, drawn in the subspace of the lowest DCT frequencies (eq. 11);
2. looks for the boundary on the ray clip(x + r v) by bisection: the next x_t.

The paper splits a budget over the iterations by N_t = N_0 lambda^(-2 t / 3) (theorem 3), for later estimates matter more. T is
the largest number for which N_0 is at least `n0`. Estimates are summed over the iterations, as in the authors' code.

Query cost of iteration t: N_t + s + about ceil(log2(10 sqrt(d))) rows, 10 at 3 x 32 x 32, where s is 1 + the directions that
failed, at most `DIRECTIONS`; the start search (`starts.find_start`) and one line search come first.

Deviations from the paper's algorithm:

- The start is a bounded search over patterns, flat images, the pool and noise instead of unbounded white noise.
- The ray is asked at the present distance first. Where it is not adversarial there, the paper goes on until it is and takes
  the further point; here the direction is halved towards that of x_t, and x_t kept where nothing helps.
- The subspace is the whole image below 64 pixels a side, and DCT with a quarter of the side from there on; the paper's is DCT
  with a third of it on ImageNet.
- Noise and tolerance shrink with the distance instead of being fixed. Where rows are rounded, noise is at least 1.3 grey
  levels, and in linf each value moves by up to one level less than r.
- What is left of the budget is spent on further iterations. The sparse variant for l1 is not here.
- Where answers are stochastic, every iteration first asks x_t again and steps outward while it fails (`moves.hold`).

The knob `radius` is the l2 length of a row's noise in the estimates, whose rows can be drawn again; the ray is not random. A
refused step is asked again further out.
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
from robustbox.protocol import Answer, Attack, Norm, Query, Search, Task

from .cgba import LARGE, LEVELS_OF_NOISE, NOISE_LENGTH
from .hop_skip_jump import FURTHER
from .moves import bisect_arc, bisect_line, estimate_normal, hold, radius_knob
from .starts import find_start
from .subspaces import Subspace, sampler

DIRECTIONS = 4
"""Directions tried in an iteration: the estimated one, and one halved towards the present one so often but once."""


@dataclass(frozen=True)
class GeoDA(Attack):
    """GeoDA: learn the normal of the boundary, and go straight along it. Minimises l2 or linf, knows labels only.

    Args:
        n0: least rows of the first estimate; the number of iterations is chosen for it.
        rate: lambda in the split of rows: each estimate takes rate^(-2/3) times the rows of the one before.
        subspace: where noise is drawn: full, dct, fft, grid or tiles; default: full, but dct from 64 pixels a side on.
        factor: by how much a subspace is smaller than the image along each side.
        memory: share of the earlier estimates that is kept in the next one; 1 as in the authors' code, 0 as in the paper.
    """

    name: ClassVar[str] = "geoda"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    targeted: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("radius",)
    takes_start: ClassVar[bool] = True

    n0: int = 30
    rate: float = 0.6
    subspace: Subspace | None = None
    factor: float = 4.0
    memory: float = 1.0

    def __post_init__(self) -> None:
        if self.n0 < 1:
            raise InputError(f"n0 must be at least 1, got {self.n0}")
        if not 0 < self.rate < 1:
            raise InputError(f"rate must be between 0 and 1, got {self.rate}")
        if not self.factor >= 1:
            raise InputError(f"factor must be at least 1, got {self.factor}")
        if not 0 <= self.memory <= 1:
            raise InputError(f"memory must be between 0 and 1, got {self.memory}")

    def search(self, task: Task) -> Search:
        channels, height, width = task.image.shape
        subspace: Subspace = self.subspace or ("full" if min(height, width) < LARGE else "dct")
        sample = sampler(subspace, (channels, height, width), self.factor, task.generator)
        knob, theta = radius_knob(task.image), NOISE_LENGTH / math.sqrt(task.image.numel())
        least = LEVELS_OF_NOISE / (task.levels - 1) if task.levels else 0.0

        point = yield from find_start(task)
        if point is None:
            return
        point = yield from bisect_line(task, point, max(2 * theta * float(torch.dist(point, task.image)), least))
        cost = 1 + math.ceil(math.log2(1 / (2 * theta)))
        (rows, _), normal = self.split(task.remaining, cost), torch.zeros_like(point)
        while True:
            point = yield from hold(task, point)
            far = float(torch.dist(point, task.image))
            if far == 0:
                return
            count = max(min(round(rows), task.remaining - cost), 1)
            estimate, _ = yield from estimate_normal(task, point, max(theta * far, least), count, sample, knob)
            normal = self.memory * normal + estimate
            point = yield from self._approach(task, point, normal, 2 * theta)
            rows *= self.rate ** (-2 / 3)

    def split(self, budget: int, cost: int) -> tuple[float, int]:
        """The rows N_0 of the first estimate and the iterations T for a budget of which each search takes `cost` rows."""
        growth: float = self.rate ** (-2 / 3)

        def first(iterations: int) -> float:
            return max(budget - iterations * cost, 1) * (growth - 1) / (growth**iterations - 1)

        iterations = 1
        while first(iterations + 1) >= self.n0:
            iterations += 1
        return first(iterations), iterations

    def _approach(
        self, task: Task, point: Tensor, normal: Tensor, tolerance: float
    ) -> Generator[Query, Answer, Tensor]:
        """The next boundary point: on the ray along the normal or, where that fails, between it and the present direction."""
        r = radius = float(distance(point - task.image, task.norm))
        present = (point - task.image) / radius
        v = _unit(normal.sign() if task.norm == "linf" else normal, task.norm)
        late = self._late(task)
        for _ in range(DIRECTIONS):

            def ray(r: float, v: Tensor = v) -> Tensor:
                return (task.image + v * (r - late).clamp_min(0)).clamp_(0, 1)

            answer = yield Query(ray(r), "step")
            if task.reached_any(answer):
                return ray((yield from bisect_arc(task, ray, r, 0.0, tolerance * radius)))
            if answer.status.any():
                r *= FURTHER
            else:
                v = _unit(v + present, task.norm)
        return point

    @staticmethod
    def _late(task: Task) -> Tensor:
        """How much later than others each value of an image starts to move along a ray [C,H,W].

        In linf all would be rounded to their next grey levels at the same radius: too coarse for an estimate to start from.
        """
        if task.norm != "linf" or not task.levels:
            return torch.zeros_like(task.image)
        generator = task.generator
        return torch.rand(task.image.shape, generator=generator, device=generator.device) / (task.levels - 1)


def _unit(direction: Tensor, norm: Norm) -> Tensor:
    """A direction [1,C,H,W] scaled to length 1; 0 where it is 0."""
    return direction / distance(direction, norm).clamp_min(1e-12).view(-1, 1, 1, 1).to(direction.dtype)
