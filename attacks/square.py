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

Knobs: `speckle` (ours, linf), the share of a proposal's values that are turned over at random, 0.002 to 0.5; `squares`, the
windows of a proposal (1 in the paper; at 100 the first windows cover everything, and a proposal is new all over); and `side`,
the least side of a window, up to half the image, beyond which few differ. A refused proposal is drawn again around the
incumbent, a refused start too. Speckle makes a proposal as dissimilar to earlier ones as several squares do, at much less
harm to what the incumbent has: a gate that compares windows of 20 values sees a new one wherever one value changed. But
speckled proposals may never beat a start that has none. So where 20 of them in a row fail, the search starts anew from other
stripes; then after 40, 80, ...

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
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import Attack, Knob, Norm, Search, Task

from .climb import Climb
from .losses import Loss, check_loss
from .painters import Bumps, Stripes

HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the horizon after which p is halved."""
SHARE: dict[Norm, float] = {"linf": 0.05, "l2": 0.1}
"""The paper's p."""
HORIZON = 10_000
MOST_SQUARES = 100
LEAST_SPECKLE = 0.002
"""The least share of the values that the knob `speckle` turns over."""
PATIENCE = 20
"""Speckled proposals in a row that fail before the search starts anew for the first time."""


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
    knobs: ClassVar[tuple[str, ...]] = ("speckle", "squares", "side")

    p: float | None = None
    horizon: int | None = None
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.p is not None and not 0 < self.p <= 1:
            raise InputError(f"p must be above 0 and at most 1, got {self.p}")
        if self.horizon is not None and self.horizon < 1:
            raise InputError(f"horizon must be at least 1, got {self.horizon}")

    def search(self, task: Task) -> Search:
        painter = Stripes(task) if task.norm == "linf" else Bumps(task)
        proposals = Proposals(task, painter, self)
        climb, patience = proposals.climb, PATIENCE
        while True:
            while not (yield from climb.start(painter.start(), painter.start)):
                pass
            failures = 0
            while failures < patience:
                won = yield from climb.challenge(proposals.draw(), proposals.draw)
                failures = 0 if won or proposals.speckle.value is None else failures + 1
            patience *= 2


class Proposals:
    """Repainted incumbents, and the knobs by which a wrapper changes their scale.

    Attributes:
        climb: where the search stands.
        speckle: the knob of that name; in l2 it is not offered, and has no value.

    Args:
        task: the image.
        painter: paints them.
        attack: the share p, the horizon and the loss.
    """

    def __init__(self, task: Task, painter: Stripes | Bumps, attack: Square) -> None:
        self._task, self._painter = task, painter
        self._height, self._width = task.image.shape[1:]
        self._budget, self._p = task.remaining, attack.p or SHARE[task.norm]
        self._horizon = attack.horizon or max(self._budget, HORIZON)
        self.speckle = self._knob("speckle", LEAST_SPECKLE, 0.5, integer=False)
        self._squares = self._knob("squares", 1, MOST_SQUARES)
        self._side = self._knob("side", 1, max(min(self._height, self._width) // 2, 1))
        linf = isinstance(painter, Stripes)
        self.climb = Climb(task, attack.loss, (*((self.speckle,) if linf else ()), self._squares, self._side))

    def draw(self, knob: str = "", value: float = 0) -> Tensor:
        """A proposal [1,C,H,W] at the values of the knobs, but for the one that is named."""
        if knob == "side":
            side = round(value)
        else:  # the schedule's, but no less than the knob's
            share = side_share(self._p, (self._budget - self._task.remaining) / self._horizon)
            side = max(round(math.sqrt(share * self._height * self._width)), round(self._side.value or 1))
        squares = round(value if knob == "squares" else self._squares.value or 1)
        row = self._painter.repaint(self.climb.row, squares, min(side, self._height, self._width))
        speckle = value if knob == "speckle" else self.speckle.value
        return self._painter.speckle(row, speckle) if speckle and isinstance(self._painter, Stripes) else row

    def _knob(self, name: str, low: float, high: float, integer: bool = True) -> Knob:
        def many(value: float, n: int) -> Tensor:
            return torch.cat([self.draw(name, value) for _ in range(n)])

        return Knob(name, low, high, many, integer)


def side_share(p: float, spent: float) -> float:
    """The share of the pixels that a window covers, after a share `spent` of the budget."""
    return math.ldexp(p, -sum(spent > mark for mark in HALVINGS))
