"""CGBA and CGBA-H (Reza, Rahmati, Wu, Dai: CGBA: Curvature-aware Geometric Black-box Attack, ICCV 2023).

From the source image x and a boundary point x_b at distance R in direction v, every iteration estimates the boundary's
normal at x_b by n_i = floor(n0 sqrt(i + 1)) noisy queries and looks for the next boundary point on the semicircle whose
diameter is the segment from x to x_b, in the plane of v and the normal (u: the normal's part orthogonal to v):

    g(a) = x + R cos(a) (cos(a) v + sin(a) u),   0 <= a <= pi/2,   g(0) = x_b,   g(pi/2) = x.

By Thales, where the boundary is a straight line in this plane, its nearest point to x lies on the semicircle; and no point
of it is further from x than x_b. The two variants differ in how they walk on it: CGBA suits low curvature (untargeted),
CGBA-H high curvature (targeted).

Query cost of iteration i: n_i + ceil(log2(pi R / 2 tol)) rows for CGBA, about n_i + 1 + ceil(log2(R / tol)) for CGBA-H; the
start search (`starts.find_start`) and one line search come first.

Deviations from the paper's algorithm:

- The start is a bounded search over patterns, flat images, the pool and noise instead of unbounded white noise. Targeted
  starts are raced along their lines to x. The paper's own targeted initialisation is not published as code and not here.
- The arc is searched by one bisection from its clean end x. It visits the paper's angles pi/2 (1 - 2^-k) until one fails,
  and then goes on in that last bracket where the authors' code starts again from x_b.
- All queries are clipped to the box. Box and source are convex: clipping never increases the distance.
- Noise and tolerance shrink with R instead of being fixed (sigma = 2e-4, tolerance = 1e-4 for ImageNet normalised by mean
  and standard deviation), and noise has the same length in every subspace (the paper's shrinks with its factor).
- Where answers are stochastic, every iteration first asks x_b again and steps outward while it fails (`moves.hold`).
- A one-sided estimate (all rows on one side of the boundary) is repeated up to twice at doubled or halved noise.

The knob `radius` is the l2 length of a row's noise in the estimates, whose rows can be drawn again; the arc is not random. A
refused step of CGBA-H is asked again further along the arc.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.errors import InputError
from robustbox.protocol import Answer, Attack, Norm, Query, Search, Task

from .moves import bisect_arc, bisect_line, estimate_normal, hold, radius_knob
from .starts import find_start
from .subspaces import Subspace, sampler

NOISE_LENGTH = 0.05
"""Length l2 of a row's noise over the current distance. Curved boundaries want it small: the noise has to see a flat piece."""
LEVELS_OF_NOISE = 1.3
"""Least noise a pixel in grey levels: below one level, rounding hides it; far above, noise leaves the flat zone."""
FURTHER, REFUSALS, LARGEST = 1.5, 5, math.radians(80)
"""By how much the angle of a refused step of CGBA-H grows; refused rows, or an angle, after which it is not taken."""
LARGE = 64
"""Images of at least this side are attacked in a subspace by default, as in the paper; small ones lose by it."""


@dataclass(frozen=True)
class CGBA(Attack):
    """CGBA: bisect the semicircle between the boundary point and the source. Minimises l2, knows labels only.

    Args:
        n0: rows of the first normal estimate; estimate i takes floor(n0 sqrt(i + 1)).
        sigma: noise of an estimate, standard deviation of a pixel in [0, 1] units; default: in all a twentieth of the current
            distance (l2), but at least 1.3 grey levels where rows are rounded.
        tolerance: a search ends when its bracket is shorter than this share of the current distance; default: than 2 sigma.
        subspace: where noise is drawn: full, dct, fft, grid or tiles; default: full, but dct from 64 pixels a side on.
        factor: by how much a subspace is smaller than the image along each side; default 4.
        memory: share of the earlier normal estimates that is kept in the next one; 0 as in the paper.
    """

    name: ClassVar[str] = "cgba"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    knobs: ClassVar[tuple[str, ...]] = ("radius",)
    takes_start: ClassVar[bool] = True

    n0: int = 30
    sigma: float | None = None
    tolerance: float | None = None
    subspace: Subspace | None = None
    factor: float = 4.0
    memory: float = 0.0

    def __post_init__(self) -> None:
        if self.n0 < 1:
            raise InputError(f"n0 must be at least 1, got {self.n0}")
        if self.sigma is not None and not self.sigma > 0:
            raise InputError(f"sigma must be positive, got {self.sigma}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must be between 0 and 1, got {self.tolerance}")
        if not self.factor >= 1:
            raise InputError(f"factor must be at least 1, got {self.factor}")
        if not 0 <= self.memory < 1:
            raise InputError(f"memory must be at least 0 and less than 1, got {self.memory}")

    def search(self, task: Task) -> Search:
        channels, height, width = task.image.shape
        subspace: Subspace = self.subspace or ("full" if min(height, width) < LARGE else "dct")
        sample = sampler(subspace, (channels, height, width), self.factor, task.generator)
        knob = radius_knob(task.image)

        point = yield from find_start(task)
        if point is None:
            return
        radius = float(torch.dist(point, task.image))
        point = yield from bisect_line(task, point, self._scales(task, radius)[1])
        kept = torch.zeros_like(point)
        for i in count():
            point = yield from hold(task, point)
            radius = float(torch.dist(point, task.image))
            if radius == 0:
                return
            sigma, tolerance = self._scales(task, radius)
            search_cost = math.ceil(math.log2(math.pi / 2 * radius / tolerance))
            rows = max(min(int(self.n0 * math.sqrt(i + 1)), task.remaining - search_cost), 1)
            for _ in range(3):
                estimate, share = yield from estimate_normal(task, point, sigma, rows, sample, knob)
                if share not in (0, 1):
                    break
                sigma *= 2 if share else 0.5
            kept = self.memory * kept + estimate
            point = yield from self._approach(task, point, kept, radius, tolerance)

    def _scales(self, task: Task, radius: float) -> tuple[float, float]:
        """Noise a pixel and search tolerance (l2) at a distance from the source."""
        least = LEVELS_OF_NOISE / (task.levels - 1) if task.levels else 0.0
        sigma = self.sigma or max(NOISE_LENGTH * radius / math.sqrt(task.image.numel()), least)
        return sigma, min(self.tolerance * radius if self.tolerance else 2 * sigma, radius / 2)

    def _approach(
        self, task: Task, point: Tensor, normal: Tensor, radius: float, tolerance: float
    ) -> Generator[Query, Answer, Tensor]:
        """The next boundary point: where the semicircle from the adversarial `point` to the clean source crosses."""
        arc = semicircle(task.image, point, normal)
        angle = yield from bisect_arc(task, arc, 0.0, math.pi / 2, tolerance / radius)
        return arc(angle) if angle else point


@dataclass(frozen=True)
class CGBAH(CGBA):
    """CGBA-H: halve the angle between normal and boundary point until the arc is adversarial, then go straight in.

    Args: those of CGBA.
    """

    name: ClassVar[str] = "cgba-h"

    def _approach(
        self, task: Task, point: Tensor, normal: Tensor, radius: float, tolerance: float
    ) -> Generator[Query, Answer, Tensor]:
        """The next boundary point: on the line from the source to the first adversarial of the angles theta / 2^k.

        A refused step is asked again further out; where that does not help, it is not taken.
        """
        arc = semicircle(task.image, point, normal)
        cosine = F.cosine_similarity((point - task.image).flatten(), normal.flatten(), dim=0)
        theta = math.acos(min(max(float(cosine), -1.0), 1.0))
        factor, refused = 0.5, 0
        while radius * theta > tolerance:
            theta *= factor
            end = arc(theta)
            answer = yield Query(end, "step")
            if task.reached_any(answer):
                return (yield from bisect_line(task, end, tolerance))
            factor = 0.5
            if answer.status.any():
                factor, refused = FURTHER, refused + 1
                if factor * theta > LARGEST or refused == REFUSALS:
                    break
        return point


def semicircle(image: Tensor, point: Tensor, normal: Tensor) -> Callable[[float], Tensor]:
    """The path g of the module's docstring, clipped to the box: from an angle to a row [1,C,H,W].

    Args:
        image: the source [C,H,W].
        point: the boundary point [1,C,H,W], not the source.
        normal: the direction into the adversarial side [1,C,H,W], of any length; where it is 0 or parallel to
            point - image, the path is the straight segment.
    """
    ray = point - image
    radius = torch.linalg.vector_norm(ray)
    v, eta = ray / radius, F.normalize(normal.flatten(), dim=0).view_as(ray)
    # The floor of the length keeps what rounding leaves of a parallel normal from becoming a direction.
    u = F.normalize((eta - torch.sum(eta * v) * v).flatten(), dim=0, eps=1e-3).view_as(ray)
    side = u * radius

    def path(angle: float) -> Tensor:
        cos, sin = math.cos(angle), math.sin(angle)
        return torch.add(image, ray, alpha=cos * cos).add_(side, alpha=cos * sin).clamp_(0, 1)

    return path
