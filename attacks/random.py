"""Random search: the blind control of CGBA and of every other attack, at equal budget.

It draws perturbations at random and learns nothing but how large they still have to be. What an attack gains over it at the
same number of queries is owed to the attack's use of answers; where it gains nothing, the model is weak to noise.

A perturbation is drawn as a ray, and a ray has a point at every radius r:

    l2    clip(x + r u), u Gaussian noise of a subspace scaled to l2 length 1
    linf  clip(x + r s), s the signs of such noise
    l0    the first r positions of a random order are set to random corners of the colour cube (each channel 0 or 1)

Where the attacker's pool holds images of the wanted class (untargeted: of other classes), every second ray leads to one of
them instead (l2, linf: the difference scaled to length 1; l0: its pixels): without, a target class is out of reach of noise.

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

from .balls import fill, whole
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
        while task.epsilon is not None or radius >= least:
            rays = self._rays(task, thresholds)
            answer = yield Query(rays.at(radius))
            reached = task.reached(answer)
            if task.epsilon is None and reached.any():
                ray = rays.pick(int(reached.nonzero()[0]))
                tolerance = max(self.tolerance * radius, least)
                radius = yield from bisect_arc(task, ray.at, radius, 0.0, tolerance)
                radius = math.ceil(radius) - 1 if task.norm == "l0" else radius * (1 - self.tolerance)

    def _rays(self, task: Task, thresholds: Tensor | None) -> Rays:
        """One batch: noise, and in every second place an image of the pool where it holds some that fit."""
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
        if (rivals := _rivals(task, self.batch // 2)) is not None:
            deltas[1::2] = rivals - image
            lengths[1::2] = limits[1::2] = distance(deltas[1::2], task.norm)
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


def _rivals(task: Task, count: int) -> Tensor | None:
    """Images of the pool that would do, drawn with replacement [count,C,H,W]; None where there are none."""
    if task.pool is None or not count:
        return None
    images, labels = task.pool
    fit = (labels != task.label if task.target is None else labels == task.target).nonzero().flatten().cpu()
    if not len(fit):
        return None
    drawn = torch.randint(len(fit), (count,), generator=task.generator, device=task.image.device).cpu()
    return images[fit[drawn].to(images.device)].to(task.image.device)
