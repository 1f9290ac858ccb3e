"""Random search: the blind control of CGBA and of every other attack, at equal budget.

It draws perturbations at random and learns nothing but how large they still have to be. What an attack gains over it at the
same number of queries is owed to the attack's use of answers; where it gains nothing, the model is weak to noise.

A perturbation is drawn as a ray, and a ray has a point at every radius r:

    l2    clip(x + r u), u Gaussian noise of a subspace scaled to l2 length 1
    linf  clip(x + r s), s the signs of such noise
    l0    the first r positions of a random order are set to random corners of the colour cube (each channel 0 or 1)

Where the attacker's pool holds images of the wanted class (untargeted: of other classes), every second ray leads to one of
them instead (l2, linf: the difference scaled to length 1; l0: its pixels): without, a target class is out of reach of noise.
At one radius each of these images is asked once, unless answers are random.

With an epsilon every row lies in the ball of that radius, and rows are independent: pure blind search. Without, rows are
drawn at the smallest radius that succeeded so far, less a share; a success is followed down its ray by bisection.

Query cost: `batch` rows a round; without epsilon a success costs up to ceil(log2(1 / tolerance)) rows more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Attack, Norm, Query, Search, Task

from .balls import edge, fill, whole
from .levels import dither
from .moves import bisect_arc
from .subspaces import Subspace, sampler


@dataclass(frozen=True)
class RandomSearch(Attack):
    """Random perturbations in any norm: the blind control of other attacks.

    Args:
        batch: rows drawn at a time.
        subspace: where the noise of l2 and linf is drawn: full, dct, fft, grid or tiles.
        factor: by how much a subspace is smaller than the image along each side.
        tolerance: share by which a row must improve on the best radius, and to which a bisection ends; without epsilon.
    """

    name: ClassVar[str] = "random"
    norms: ClassVar[tuple[Norm, ...]] = ("l0", "l2", "linf")

    batch: int = 10
    subspace: Subspace = "full"
    factor: float = 4.0
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}")
        if not self.factor >= 1:
            raise InputError(f"factor must be at least 1, got {self.factor}")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must be between 0 and 1, got {self.tolerance}")

    def search(self, task: Task) -> Search:
        width = float(distance(torch.ones_like(task.image)[None], task.norm))
        radius = width if task.epsilon is None else task.epsilon
        thresholds = dither(task) if task.norm == "l2" else None
        least = 1.0 if task.norm == "l0" else 1e-3 * width  # nothing is left to gain below
        if task.norm == "linf" and task.levels:
            least = max(least, 1 / (task.levels - 1))
        rivals = _Rivals(task)
        while task.epsilon is not None or edge(radius) >= least:
            rays = self._rays(task, rivals, thresholds)
            answer = yield Query(rays.at(radius))
            reached = task.reached(answer)
            if task.epsilon is None and reached.any():
                ray = rays.pick(int(reached.nonzero()[0]))
                tolerance = max(self.tolerance * radius, least)
                radius = yield from bisect_arc(task, ray.at, radius, 0.0, tolerance)
                radius = self._nearer(task, radius)
                rivals.again()

    def _nearer(self, task: Task, radius: float) -> float:
        """The radius at which rows are drawn after a success; in linf less than a grey level nearer is the same row."""
        if task.norm == "l0":
            return math.ceil(radius) - 1
        nearer = radius * (1 - self.tolerance)
        if task.norm == "linf" and task.levels:
            nearer = min(nearer, whole(task, radius) - 1 / (task.levels - 1))
        return nearer

    def _rays(self, task: Task, rivals: _Rivals, thresholds: Tensor | None) -> Rays:
        """One batch: noise, and in every second place an image of the pool while there are some that fit."""
        image, generator = task.image, task.generator
        channels, height, width = image.shape
        size = (self.batch, channels, height, width)
        order = None
        if task.norm == "l0":
            corners = torch.randint(2, size, generator=generator, device=image.device)
            deltas = corners - image
            keys = torch.rand(self.batch, height * width, generator=generator, device=image.device)
            order = keys.argsort(dim=1).argsort(dim=1).view(-1, 1, height, width)
        else:
            deltas = sampler(self.subspace, (channels, height, width), self.factor, generator)(self.batch)
            if task.norm == "linf":
                deltas = deltas.sign()
        lengths = distance(deltas, task.norm)
        limits = torch.full_like(lengths, math.inf)
        images = rivals.draw(self.batch // 2)
        places = slice(1, 2 * len(images), 2)
        deltas[places] = images - image
        lengths[places] = limits[places] = distance(deltas[places], task.norm)
        return Rays(task, deltas, order, lengths, limits, thresholds)


@dataclass(frozen=True)
class Rays:
    """n rays from one image.

    Args:
        task: their image, its norm and its grey levels.
        deltas: [n,C,H,W], the directions; l0: what is added to a changed pixel.
        order: l0: the place of each pixel in the order of change, [n,1,H,W]; else None.
        lengths: norms of deltas, [n].
        limits: radius at which a ray ends, [n]: an image of the pool, or nowhere (inf).
        thresholds: of `balls.fill`, which rounds rows in l2, the same at all radii; None where they are not rounded.
    """

    task: Task
    deltas: Tensor
    order: Tensor | None
    lengths: Tensor
    limits: Tensor
    thresholds: Tensor | None

    def pick(self, i: int) -> Rays:
        """The i-th ray alone."""
        order = None if self.order is None else self.order[i : i + 1]
        one = slice(i, i + 1)
        return Rays(self.task, self.deltas[one], order, self.lengths[one], self.limits[one], self.thresholds)

    def at(self, radius: float) -> Tensor:
        """The point of each ray at a radius: rows [n,C,H,W] in the box, no further than `radius` from the image.

        Rounded to grey levels they are no further either.
        """
        if self.order is not None:
            deltas = self.deltas * (self.order < math.floor(radius))
        elif self.thresholds is not None:
            deltas = fill(self.task, self.deltas, self.limits.clamp(max=radius), self.thresholds)
        else:
            scale = (self.limits.clamp(max=radius) / self.lengths).view(-1, 1, 1, 1)
            deltas = self.deltas * scale.to(self.deltas.dtype)
            if self.task.norm == "linf":
                most = whole(self.task, radius)
                deltas.clamp_(-most, most)
        return (self.task.image + deltas).clamp_(0, 1)


class _Rivals:
    """The images of the pool that would do, in random order: each of them once at a radius, where answers are not random."""

    def __init__(self, task: Task) -> None:
        self._task, self._fit = task, torch.empty(0, dtype=torch.long)
        if task.pool is not None:
            labels = task.pool[1]
            self._fit = (
                (labels != task.label if task.target is None else labels == task.target).nonzero().flatten().cpu()
            )
        self._left = self._shuffled()

    def again(self) -> None:
        """All of them may be drawn again."""
        self._left = self._shuffled()

    def draw(self, count: int) -> Tensor:
        """The next ones [at most count,C,H,W]."""
        image, pool = self._task.image, self._task.pool
        while self._task.stochastic and len(self._fit) and len(self._left) < count:
            self._left = torch.cat([self._left, self._shuffled()])
        drawn, self._left = self._left[:count], self._left[count:]
        return image[None][:0] if pool is None else pool[0][drawn.to(pool[0].device)].to(image.device)

    def _shuffled(self) -> Tensor:
        generator = self._task.generator
        return self._fit[torch.randperm(len(self._fit), generator=generator, device=generator.device).cpu()]
