"""Square Attack (Andriushchenko, Croce, Flammarion, Hein: Square Attack: a query-efficient black-box adversarial attack via
random search, ECCV 2020). Random search at a fixed radius: repaint a square window, keep it if the loss falls.

The side of the window is the s nearest to sqrt(p H W); after q of Q queries, p is halved at q / Q = 0.001, 0.005, 0.02, 0.05,
0.1, 0.2, 0.4, 0.6 and 0.8 (paper, 4.1, for Q = 10,000). Q is the budget here, but at least 10,000.

linf  Start: vertical stripes of one pixel's width, epsilon up or down in each channel. A proposal paints a square with one
      colour, epsilon up or down in each channel (Algorithm 2); one that would change nothing turns a channel over.
l2    Start: a grid of 5 x 5 tiles, each a bump and its negative side by side (eta, 3.4), scaled to epsilon. A proposal takes
      what the perturbation has in two windows W1 and W2 of odd side, and what it has left of epsilon, and puts it all into
      W1, along its old direction there plus a new bump (Algorithm 3):

          nu[W1] = m (s eta + nu[W1] / |nu[W1]|) / |...|,   m^2 = |nu[W1 u W2]|^2 + max(epsilon^2 - |nu|^2, 0) / C,   nu[W2] = 0

      a channel, with random signs s, eta upright or across; then all is scaled to epsilon and clipped to the box.

Query cost: 1 row for the start and 1 row a proposal; 2 a proposal where answers are stochastic (`climb.py`).

Knobs: `squares`, the windows of a proposal (1 in the paper; at 100 the first windows cover everything, and a proposal is new
all over), and `side`, the least side of a window, up to half the image, beyond which few differ. A refused proposal is drawn
again around the incumbent, a refused start too.

Deviations from the paper:

- The authors shrink the schedule with the budget. Here a small budget sees its beginning: on CIFAR-10 in linf 0.03 that breaks
  50 images in 44 queries on average, the whole schedule within 2,000 in 56; in l2 they tie (docs/benchmarks.md).
- Targeted, the loss is the margin, too; `loss=cross-entropy` is the paper's.
- Windows reach the last row and column, may be as large as the image, and images need not be square.
- On an 8-bit interface, epsilon in linf is rounded down to whole levels, and l2 rows are shortened by what rounding adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.errors import InputError
from robustbox.protocol import Attack, Knob, Norm, Search, Task

from .balls import check_visible, fit, whole
from .climb import Climb
from .losses import Loss, check_loss

HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the horizon after which p is halved."""
SHARE: dict[Norm, float] = {"linf": 0.05, "l2": 0.1}
"""The paper's p."""
HORIZON = 10_000
MOST_SQUARES = 100
TILES = 5
LEAST_SIDE = 3
"""Of the windows in l2: below, a bump has no shape."""


@dataclass(frozen=True)
class Square(Attack):
    """Square Attack: random search over square windows, at a fixed radius. Knows scores, needs epsilon.

    Args:
        p: share of the pixels that the first windows cover, at most 1; default: 0.05 in linf, 0.1 in l2. Robust models want
            more.
        horizon: queries over which the windows shrink; default: the budget, but at least 10,000.
        loss: margin, cross-entropy (the paper's when targeted) or probability.
    """

    name: ClassVar[str] = "square"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    needs_epsilon: ClassVar[bool] = True
    knobs: ClassVar[tuple[str, ...]] = ("squares", "side")

    p: float | None = None
    horizon: int | None = None
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.p is not None and not 0 < self.p <= 1:
            raise InputError(f"p must be above 0 and at most 1, got {self.p}")
        if self.horizon is not None and self.horizon < 1:
            raise InputError(f"horizon must be at least 1, got {self.horizon}")

    def check(self, task: Task) -> None:
        if task.norm == "linf":
            assert task.epsilon is not None  # needs_epsilon
            check_visible(task, task.epsilon, f"epsilon={task.epsilon:g}")

    def search(self, task: Task) -> Search:
        painter = Stripes(task) if task.norm == "linf" else Bumps(task)
        height, width = task.image.shape[1:]
        budget, p = task.remaining, self.p or SHARE[task.norm]
        horizon = self.horizon or max(budget, HORIZON)

        def propose(count: float | None = None, least: float | None = None) -> Tensor:
            count = squares.value or 1 if count is None else count
            if least is None:  # the schedule's, but no less than the knob's
                share = side_share(p, (budget - task.remaining) / horizon)
                least = max(round(math.sqrt(share * height * width)), side.value or 1)
            return painter.repaint(climb.row, round(count), min(round(least), height, width))

        def many(n: int, count: float | None = None, least: float | None = None) -> Tensor:
            return torch.cat([propose(count, least) for _ in range(n)])

        most = max(min(height, width) // 2, 1)
        squares = Knob("squares", 1, MOST_SQUARES, lambda value, n: many(n, count=value), integer=True)
        side = Knob("side", 1, most, lambda value, n: many(n, least=value), integer=True)
        climb = Climb(task, self.loss, (squares, side))
        while not (yield from climb.start(painter.start(), painter.start)):
            pass
        while True:
            yield from climb.challenge(propose(), propose)


def side_share(p: float, spent: float) -> float:
    """The share of the pixels that a window covers, after a share `spent` of the budget."""
    return math.ldexp(p, -sum(spent > mark for mark in HALVINGS))


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
