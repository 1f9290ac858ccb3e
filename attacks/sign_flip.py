"""Sign Flip Attack (Chen, Zhang, Hu, Wu: Boosting Decision-based Black-box Adversarial Attacks with Random Sign Flip, ECCV
2020; code: github.com/wubaoyuan/Sign-Flip-Attack).

An adversarial point x + delta is brought nearer in linf by two random moves an iteration, each of which is kept where the
point still reaches the goal:

    project   delta' = clip(delta + alpha eta, -(l - alpha), l - alpha),   l = |delta|_inf,   eta in {-1, +1} at random
    flip      delta' = s * delta,   s_i = -1 with probability 1 - p_i, else +1

Every tenth iteration, alpha is multiplied by 1.5 where more than 7 of 10 projections were kept, and divided by it at less
than 3; in the same cases of flips all p_i fall or rise by 0.001. A kept flip also moves each p_i by 0.0001 against what s_i
did. p stays within 0.99 and 0.9999. With a factor f > 1, eta and s are drawn on the image made f times smaller and enlarged
bilinearly (s: the sign of that).

Query cost: 2 rows an iteration; the start search (`starts.find_start`) and a bisection of 10 rows come first. Black boxes
that are stochastic are asked again for x + delta in each iteration: at least 1 row more.

Deviations from the paper's algorithm:

- The start is the search that other attacks here use, repeated until it finds one, instead of uniform noise; targeted as in
  the paper from images of the target class.
- alpha is at most l / 2: the code's projection is undefined beyond l.
- Rows that are rounded to grey levels are dithered (`levels.on_levels`).

Knobs: `step` is alpha (1e-4 to 0.25), `flips` the expected number of values that a flip turns, over the image made f times
smaller (1 to a quarter of them; p is then the same everywhere). Refused rows are drawn again from the same move, and count
as kept where alpha and p are adapted: a refused move goes further next time.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Answer, Attack, Knob, Norm, Query, Search, Task

from .levels import dither, on_levels
from .moves import bisect_arc, hold
from .starts import find_start

PERIOD, OFTEN, SELDOM = 10, 0.7, 0.3
"""Iterations between adaptations, and the shares of kept moves beyond which there is one."""
ALPHA, GROWTH = 0.004, 1.5
STAY, STAYS = 0.999, (0.99, 0.9999)
"""p at first, and its range."""
LEARN, SHIFT = 1e-4, 1e-3
"""Changes of p: by a flip that is kept, and by an adaptation."""
HALVINGS = 10
LEAST = 1e-6
"""Of l and alpha: about what float32 resolves."""


@dataclass(frozen=True)
class SignFlip(Attack):
    """Sign Flip Attack: shrink a linf perturbation at random, and flip signs at random. Minimises linf, knows labels only.

    Args:
        factor: by how much the grid on which moves are drawn is smaller than the image along each side.
    """

    name: ClassVar[str] = "sign-flip"
    norms: ClassVar[tuple[Norm, ...]] = ("linf",)
    knobs: ClassVar[tuple[str, ...]] = ("step", "flips")
    takes_start: ClassVar[bool] = True

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise InputError(f"factor must be at least 1, got {self.factor}")

    def search(self, task: Task) -> Search:
        start = yield from find_start(task)
        while start is None:
            start = yield from find_start(task, again=True)
        moves = _Moves(task, start - task.image, self.factor)
        yield from moves.shorten()
        for i in count(1):
            yield from moves.hold()
            if moves.limit < LEAST:
                return  # nothing is left to gain
            moves.project((yield moves.projection()))
            moves.flip((yield moves.flipping()))
            if i % PERIOD == 0:
                moves.adapt()


class _Moves:
    """The perturbation of a search and the moves that change it.

    Attributes:
        limit: l, the linf length of delta.
    """

    def __init__(self, task: Task, delta: Tensor, factor: float) -> None:
        channels, height, width = task.image.shape
        self._task, self._thresholds = task, dither(task)
        self._delta, self.limit = delta, float(distance(delta, "linf"))
        self._alpha = ALPHA
        self._stay = torch.full(  # p, on the grid of the moves
            (channels, max(int(height / factor), 1), max(int(width / factor), 1)), STAY, device=delta.device
        )
        self._proposed, self._signs = delta, torch.ones_like(self._stay)
        self._projections = self._flips = 0
        most = math.ceil(self._stay.numel() / 4)
        self._step = Knob("step", 1e-4, 0.25, lambda value, n: self._rows(self._projected(value, n)))
        self._turns = Knob("flips", 1, most, lambda value, n: self._rows(self._flipped(value, n)[0]), integer=True)

    def shorten(self) -> Generator[Query, Answer, None]:
        """Clip delta to the least length at which it still reaches the goal."""
        delta = self._delta
        path = lambda length: self._rows(delta.clamp(-length, length))  # noqa: E731
        self.limit = yield from bisect_arc(self._task, path, self.limit, 0.0, self.limit / 2**HALVINGS)
        self._delta = delta.clamp(-self.limit, self.limit)

    def hold(self) -> Generator[Query, Answer, None]:
        """Ask for the point again where answers are stochastic; while it fails, stand further out."""
        if self._task.stochastic:
            point = self._rows(self._delta)
            held = yield from hold(self._task, point)
            if not torch.equal(held, point):
                self._delta = held - self._task.image
                self.limit = float(distance(self._delta, "linf"))

    def projection(self) -> Query:
        """Ask for a random change that makes delta shorter by alpha."""

        def draw() -> Tensor:
            self._proposed = self._projected(self._step.value or self._alpha, 1)
            return self._rows(self._proposed)

        return Query(draw(), "step", lambda _: draw(), (self._step,))

    def project(self, answer: Answer) -> None:
        """Keep the change where it reached the goal."""
        if self._task.reached_any(answer):
            self._delta = self._proposed
            self.limit -= min(self._step.value or self._alpha, self.limit / 2)
        self._projections += self._welcome(answer)

    def flipping(self) -> Query:
        """Ask for delta with random signs flipped."""

        def draw() -> Tensor:
            self._proposed, self._signs = self._flipped(self._turns.value, 1)
            return self._rows(self._proposed)

        return Query(draw(), "step", lambda _: draw(), (self._turns,))

    def flip(self, answer: Answer) -> None:
        """Keep the flips where they reached the goal, and learn from them where to flip."""
        if self._task.reached_any(answer):
            self._delta = self._proposed
            self._stay = (self._stay - LEARN * self._signs[0]).clamp_(*STAYS)
        self._flips += self._welcome(answer)

    def adapt(self) -> None:
        """Make moves larger that were mostly kept, and smaller those that were mostly not."""
        if self._projections > OFTEN * PERIOD:
            self._alpha = min(GROWTH * self._alpha, self.limit / 2)
        elif self._projections < SELDOM * PERIOD:
            self._alpha = max(self._alpha / GROWTH, LEAST)
        if self._flips > OFTEN * PERIOD:
            self._stay = (self._stay - SHIFT).clamp_(*STAYS)
        elif self._flips < SELDOM * PERIOD:
            self._stay = (self._stay + SHIFT).clamp_(*STAYS)
        self._projections = self._flips = 0

    def _welcome(self, answer: Answer) -> bool:
        """Whether a move counts as kept: a refused one does, so that moves get larger where they are refused."""
        return bool(answer.status.any()) or self._task.reached_any(answer)

    def _projected(self, alpha: float, n: int) -> Tensor:
        alpha = min(alpha, self.limit / 2)
        eta = self._enlarge(self._random(n).sub_(0.5).sign_())
        return torch.add(self._delta, eta, alpha=alpha).clamp_(alpha - self.limit, self.limit - alpha)

    def _flipped(self, flips: float | None, n: int) -> tuple[Tensor, Tensor]:
        """n perturbations with flipped signs, and the signs on the grid; flips: how many on average, None: those of p."""
        stay = self._stay if flips is None else 1 - flips / self._stay.numel()
        beyond = self._random(n) - stay
        # Of the values of a small image often none turns: the one nearest to it does, or the row would be asked twice.
        signs = 1 - 2 * ((beyond > 0) | (beyond == beyond.amax(dim=(1, 2, 3), keepdim=True))).float()
        return torch.where(self._enlarge(signs) < 0, -self._delta, self._delta), signs

    def _random(self, n: int) -> Tensor:
        generator = self._task.generator
        return torch.rand(n, *self._stay.shape, generator=generator, device=generator.device)

    def _enlarge(self, grid: Tensor) -> Tensor:
        height, width = self._delta.shape[2:]
        if grid.shape[2:] == (height, width):
            return grid
        return F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)

    def _rows(self, deltas: Tensor) -> Tensor:
        return on_levels(self._task, deltas, self._thresholds)
