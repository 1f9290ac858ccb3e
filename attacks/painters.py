"""What the Square Attack (`square.py`) paints: stripes and squares in linf, bumps in l2."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.protocol import Task

from .balls import fit, whole

TILES = 5
LEAST_SIDE = 3
"""Of the windows in l2: below, a bump has no shape."""


class Painter:
    """Draws windows of an image [C,H,W], and signs, from its task's stream."""

    def __init__(self, task: Task) -> None:
        self._task, self._shape = task, task.image.shape
        self._places = [torch.arange(size, device=task.image.device) for size in self._shape[1:]]

    def _windows(self, count: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where rows [count,H,1] and columns [count,1,W] stand in uniformly placed windows, and if both do: [count,H,W]."""
        corners = (self._draw(size - side + 1, count, 1, 1) for size in self._shape[1:])
        down, across = (place - corner for place, corner in zip(self._places, corners, strict=True))
        down = down.mT
        return down, across, ((down >= 0) & (down < side)) & ((across >= 0) & (across < side))

    def _draw(self, values: int, *size: int) -> Tensor:
        """Uniform in 0, ..., values - 1."""
        generator = self._task.generator
        return torch.randint(values, size, generator=generator, device=generator.device)


class Stripes(Painter):
    """linf: every value is epsilon up or down, a square has one colour."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        assert task.epsilon is not None
        radius = whole(task, task.epsilon)
        self._up, self._down = ((task.image + change).clamp_(0, 1) for change in (radius, -radius))

    def start(self) -> Tensor:
        """Vertical stripes: a row [1,C,H,W]."""
        channels, _, width = self._shape
        return self._colour(self._draw(2, channels, 1, width) > 0)[None]

    def repaint(self, row: Tensor, count: int, side: int) -> Tensor:
        """A row [1,C,H,W] with `count` squares painted over."""
        _, _, inside = self._windows(count, side)
        colours, painted = self._draw(2, count, self._shape[0]) > 0, inside.any(dim=0)
        uppermost = inside.byte().argmax(dim=0)
        fresh = torch.where(painted, self._colour(colours[uppermost].permute(2, 0, 1)), row)
        if fresh.equal(row):
            channel = torch.arange(self._shape[0], device=row.device) == self._draw(self._shape[0], 1)
            fresh = torch.where(painted & channel.view(-1, 1, 1), self._colour(row[0] != self._up), row)
        return fresh

    def speckle(self, row: Tensor, share: float) -> Tensor:
        """A row [1,C,H,W] with a share of its values turned over."""
        generator = self._task.generator
        turned = torch.rand(self._shape, generator=generator, device=generator.device) < share
        return torch.where(turned, self._colour(row[0] != self._up), row)

    def _colour(self, up: Tensor) -> Tensor:
        """The image with values moved up or down, [C,H,W]."""
        return torch.where(up, self._up, self._down)


class Bumps(Painter):
    """l2: bumps of both signs, which windows take from each other."""

    def start(self) -> Tensor:
        """A grid of bumps over the image: a row [1,C,H,W]."""
        channels, *size = self._shape
        side = max(min(size) // TILES, 1)
        counts = [length // side for length in size]
        tile = bump(side, self._task.image.device).repeat(*counts)
        across = bump(side, self._task.image.device).T.repeat(*counts)
        coins = torch.stack([self._draw(2, *counts) for _ in range(channels + 1)])
        coins = coins.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
        deltas = torch.zeros_like(self._task.image)
        (top, left), (height, width) = ((s - n * side) // 2 for s, n in zip(size, counts, strict=True)), tile.shape
        upright, signs = coins[0] > 0, 2 * coins[1:] - 1
        deltas[:, top : top + height, left : left + width] = torch.where(upright, tile, across) * signs
        return self._scaled(deltas)

    def repaint(self, row: Tensor, count: int, side: int) -> Tensor:
        """A row [1,C,H,W] in which `count` windows took from as many others, one after the other."""
        side = min(max(side, LEAST_SIDE) | 1, *self._shape[1:])
        deltas = row[0] - self._task.image
        for _ in range(count):
            deltas = self._shifted(deltas, side)
        return self._scaled(deltas)

    def _shifted(self, deltas: Tensor, side: int) -> Tensor:
        """Algorithm 3's update of a perturbation [C,H,W]."""
        assert self._task.epsilon is not None
        down, across, windows = self._windows(2, side)
        here, there = windows
        tile = bump(side, deltas.device)
        tile = torch.where(self._draw(2, 1) > 0, tile, tile.T)
        new = tile[down[0].clamp(0, side - 1), across[0].clamp(0, side - 1)] * here
        signs = 2 * self._draw(2, len(deltas), 1, 1) - 1
        new = _unit(deltas * here) + new * signs
        spare = (self._task.epsilon**2 - deltas.square().sum()).clamp_min(0) / len(deltas)
        size = (spare + (deltas * (here | there)).square().sum(dim=(1, 2), keepdim=True)).sqrt()
        return torch.where(here, size * _unit(new), deltas.masked_fill(there, 0))

    def _scaled(self, deltas: Tensor) -> Tensor:
        """The row [1,C,H,W] of a perturbation [C,H,W] at length epsilon."""
        assert self._task.epsilon is not None
        length = torch.linalg.vector_norm(deltas).clamp_min(torch.finfo(deltas.dtype).tiny)
        return fit(self._task, deltas[None] * (self._task.epsilon / length))


def _unit(deltas: Tensor) -> Tensor:
    """Each channel [C,H,W] at length 1, or 0 where it is 0."""
    lengths: Tensor = torch.linalg.vector_norm(deltas, dim=(1, 2), keepdim=True)
    return deltas / lengths.clamp_min(1e-10)


@lru_cache(maxsize=256)
def bump(side: int, device: torch.device) -> Tensor:
    """eta [side,side] (3.4): a hill above its negative, of length 1."""
    hills = torch.cat([_hill(side // 2, side), -_hill(side - side // 2, side)])
    return F.normalize(hills.flatten(), dim=0).view(side, side).to(device)


def _hill(height: int, width: int) -> Tensor:
    """At distance r (the larger of rows and columns) from the centre, the sum of 1 / k^2 for k > r; of length 1."""
    down, across = ((torch.arange(size) - size // 2).abs() for size in (height, width))
    steps = torch.arange(1, max(height, width) // 2 + 2)
    tails = steps.pow(-2.0).flip(0).cumsum(0).flip(0)
    return F.normalize(tails[torch.maximum(down[:, None], across)].flatten(), dim=0).view(height, width)
