"""Bandits-TD (Ilyas, Engstrom, Madry: Prior Convictions: Black-Box Adversarial Attacks with Bandits and Priors, ICLR 2019;
code: github.com/MadryLab/blackbox-bandits).

Gradients of successive steps are alike (time prior) and neighbouring pixels' are alike (data prior). So a vector v of one
value a tile of t x t pixels is carried along, which is learnt as in a bandit problem from two queries a step. With T(v) the
image of the tiles, e(v) = T(v) / |T(v)|, u ~ N(0, I / dim v) and L a loss that is small where the goal is near:

    delta = (L(x + eta e(v + rho u)) - L(x + eta e(v - rho u))) / eta u
    linf  v <- tanh(artanh(v) - rate delta)    exponentiated gradients,    x <- clip(x + h sign(T(v)))
    l2    v <- v - rate delta,                                             x <- clip(x + h e(v))

v points where L falls, so x goes along v (`estimators.py` has the steps; eta = sigma sqrt(d) in d dimensions).

Query cost: 2 rows a step. The iterate itself is not asked: the next pair lies at distance eta from it.

Knobs: `sigma` scales probes (a pair is a group) and `step` is h, how far one pair is from the next; a value replaces the
option. A pair is drawn again by another u. After a refused pair the search stays where it is and draws again.

Deviations:

- All rows lie in the box and in the ball, so that each may be the success; the authors' probes leave both, and their tests
  of success are not counted.
- L is by default the margin of log-probabilities in place of the cross-entropy; targets are not in the paper.
- Defaults suit 32 x 32: t = 2, 1 below 16 x 16, and rates of 0.1 (linf) and 0.01 (l2), where the authors' t = 6 and rates of
  100 and 0.1 are for the probabilities of Inception-v3 at 299 x 299; at 100 the prior saturates after one pair. rho and h over
  epsilon are theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import Attack, Knob, Norm, Query, Search, Task

from .estimators import LENGTHS, Ball, sigma_knob, unit, visible
from .losses import Loss, check_loss, losses
from .subspaces import enlarge

LARGE = 16
"""Side of the images from which on tiles are of 2 x 2: on smaller ones so few are left that rows repeat."""


@dataclass(frozen=True)
class Bandits(Attack):
    """Bandits with time and tile priors (Bandits-TD). Needs epsilon and scores.

    Args:
        tile: pixels t along each side of a tile; 1 leaves the data prior out; default: 2 on images of at least 16 x 16, else 1.
        sigma: root mean square of a probe's offset a pixel; at least one grey level where rows are rounded.
        step: step length h, a pixel (linf) or in all (l2); default: a fifth (linf) or a tenth (l2) of epsilon.
        rate: learning rate of the prior; default: 0.1 (linf) or 0.01 (l2).
        exploration: length rho of the noise on the prior; default: 1 (linf) or 0.01 (l2).
        loss: margin (of log-probabilities) or probability (of the true class, or one minus that of the target).
    """

    name: ClassVar[str] = "bandits"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    needs_epsilon: ClassVar[bool] = True
    knobs: ClassVar[tuple[str, ...]] = ("sigma", "step")

    tile: int | None = None
    sigma: float = 0.002
    step: float | None = None
    rate: float | None = None
    exploration: float | None = None
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 1:
            raise InputError(f"tile must be at least 1, got {self.tile}")
        for option in ("sigma", "step", "rate", "exploration"):
            value = getattr(self, option)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{option} must be positive, got {value}")
        check_loss(self.loss)

    def search(self, task: Task) -> Search:
        prior = _Prior(task, self)
        while True:
            answer = yield prior.query()
            up, down = losses(task, answer, self.loss).tolist()
            if math.isfinite(up) and math.isfinite(down):
                prior.learn(up - down)
                prior.follow()


class _Prior:
    """The prior v, the point x where the attack stands, and the pair of rows that it asks."""

    def __init__(self, task: Task, attack: Bandits) -> None:
        assert task.epsilon is not None  # needs_epsilon
        self._task, self._ball, self._point = task, Ball(task, task.epsilon), task.image[None]
        linf = task.norm == "linf"
        self._linf = linf
        self._rate = attack.rate or (0.1 if linf else 0.01)
        self._exploration = attack.exploration or (1.0 if linf else 0.01)
        self._sigma = visible(task, attack.sigma)
        self._step = attack.step or task.epsilon / (5 if linf else 10)
        channels, *size = task.image.shape
        tile = attack.tile or (2 if min(size) >= LARGE else 1)
        self._cells = (channels, *(-(-side // tile) for side in size))
        cells = torch.arange(math.prod(self._cells), device=task.image.device).view(1, *self._cells)
        self._place = enlarge(cells, (size[0], size[1])).flatten()  # the cell of each value of the image
        self._w = task.image.new_zeros(1, *self._cells)  # artanh v in linf, v in l2
        self._u, self._eta = self._w, 0.0

        def around(length: float, n: int) -> Tensor:
            return self._ball.around(self._point, length, n)

        self._noise, self._stride = sigma_knob(task), Knob("step", task.epsilon / LENGTHS, task.epsilon, around)
        self._noise.draw = lambda sigma, n: self._rows(self._draw(-(-n // 2)), self._length(sigma))[:n]

    def query(self) -> Query:
        """The next pair."""
        return Query(self._pair(), "probe", self._redraw, (self._noise, self._stride), (0, 0))

    def learn(self, rise: float) -> None:
        """Turn the prior away from where the loss rises: by the difference of the pair's losses."""
        self._w = torch.add(self._w, self._u, alpha=-self._rate * rise / self._eta)

    def follow(self) -> None:
        """Go a step along the prior."""
        step = self._step if self._stride.value is None else self._stride.value
        self._point = self._ball.descend(self._point, -self._image(self._v), step)

    @property
    def _v(self) -> Tensor:
        return self._w.tanh() if self._linf else self._w

    def _pair(self) -> Tensor:
        self._u = self._draw(1)
        self._eta = self._length(self._sigma if self._noise.value is None else self._noise.value)
        return self._rows(self._u, self._eta)

    def _redraw(self, positions: list[int]) -> Tensor:
        return self._pair()[positions]

    def _rows(self, u: Tensor, eta: float) -> Tensor:
        """Pairs around the point, [2 n,C,H,W] for u [n,C,h,w]."""
        v = self._v + self._exploration * torch.stack([u, -u], dim=1).flatten(0, 1)
        return self._ball.rows(torch.add(self._point, unit(self._image(v)), alpha=eta))

    def _image(self, v: Tensor) -> Tensor:
        return v.flatten(1).index_select(1, self._place).view(len(v), *self._task.image.shape)

    def _draw(self, n: int) -> Tensor:
        generator = self._task.generator
        noise = torch.randn(n, *self._cells, generator=generator, device=generator.device)
        return noise / math.sqrt(math.prod(self._cells))

    def _length(self, sigma: float) -> float:
        return sigma * math.sqrt(self._task.image.numel())
