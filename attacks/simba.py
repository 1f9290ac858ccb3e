"""SimBA and SimBA-DCT (Guo, Gardner, You, Wilson, Weinberger: Simple Black-box Adversarial Attacks, ICML 2019).

From an orthonormal basis Q, directions q are taken at random without replacement; the perturbation moves by a step along q if
the loss falls, else along -q if it falls there, else not (Algorithm 1):

    delta <- delta + alpha q,   alpha in {step, -step},   row clip(x + delta)

After T steps taken from a Q that is not yet used up, |delta|_2 = step sqrt(T) (paper, 3.1), and clipping only shortens it.

    pixel   q is one value of one channel
    dct     q is one frequency of the 2-D DCT of one channel: the lowest (H / factor) x (W / factor) in random order, then, a
            quarter of the block's side at a time, the frequencies around them (the authors' strided order)

With an epsilon the perturbation is kept in the ball: values are cut off at epsilon (linf), or it is scaled to epsilon (l2).
Without, the paper's search ends at its first success, and delta is as long as it came to be. Where the loss is linear that
length is proportional to sqrt(step), at a cost proportional to 1 / step: the search starts over from the image at half the
step, as long as the budget lasts, and the shortest success counts.

Query cost: 1 row for the image, then 1 row a direction, 2 where the first sign fails; twice as many where answers are
stochastic (`climb.py`).

Knobs: `step`, from 0.01 to 1 (pixel) or sqrt(d) / 8 (dct), which is not halved where it is set. A refused row counts as no
improvement; the first sign is drawn again along the next direction, the second is not drawn again.

Deviations from the paper, beside starting over:

- The loss is the margin, which still tells rows apart where the probability rounds to 1; `loss=probability` is the paper's.
- Once all of Q was used, it is shuffled and used again; directions that are taken twice end the guarantee.
- A first sign that changes nothing, because it leads out of the box or the ball, is not asked.
- In the basis dct, rows that are rounded to grey levels are dithered (`levels.on_levels`) once a step's wave is less than a
  level high (after two halvings at 32 x 32), where rounding would hide that one row differs from the next.
- Where answers are stochastic, a success counts as one when the point succeeds again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from robustbox.errors import InputError, unknown_name
from robustbox.protocol import Attack, Knob, Norm, Search, Task

from .balls import check_visible, fit, shorten
from .climb import Climb
from .levels import dither
from .losses import Loss, check_loss
from .subspaces import dct_matrix

Basis = Literal["pixel", "dct"]

LEAST_STEP = 1e-3
"""Without epsilon: where halving ends; in the pixel basis of an 8-bit interface, at a level."""
LARGE = 64
"""Images of at least this side start at the paper's low frequencies."""


@dataclass(frozen=True)
class SimBA(Attack):
    """SimBA: steps along pixels or frequencies, one at a time, kept if the loss falls. Knows scores; epsilon is optional.

    Args:
        basis: pixel or dct.
        step: length l2 of a step; in the pixel basis also what it changes a value by. Without epsilon: of the first try's.
        factor: dct: by how much the block of frequencies that come first is smaller than the image along each side; default:
            the paper's 8 for images of at least 64 x 64, else 1, which is all frequencies in random order.
        loss: margin, probability (the paper's) or cross-entropy.
    """

    name: ClassVar[str] = "simba"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    knobs: ClassVar[tuple[str, ...]] = ("step",)

    basis: Basis = "dct"
    step: float = 0.2
    factor: float | None = None
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.basis not in get_args(Basis):
            raise unknown_name("basis", self.basis, get_args(Basis))
        if not 0 < self.step < math.inf:
            raise InputError(f"step must be above 0, got {self.step}")
        if self.factor is not None and not self.factor >= 1:
            raise InputError(f"factor must be at least 1, got {self.factor}")

    def check(self, task: Task) -> None:
        if self.basis == "pixel":
            check_visible(task, self.step, f"step={self.step:g}")

    def search(self, task: Task) -> Search:
        most = 1.0 if self.basis == "pixel" else math.sqrt(task.image.numel()) / 8
        least = 1 / (task.levels - 1) if task.levels and self.basis == "pixel" else LEAST_STEP
        knob = Knob("step", 0.01, most, lambda value, n: torch.cat([aside(value) for _ in range(n)]))
        climb = Climb(task, self.loss, (knob,))
        directions, step = Directions(task, self.basis, self.factor), self.step
        thresholds, crest = dither(task) if self.basis == "dct" else None, 2 / math.sqrt(task.image[0].numel())

        def sent(deltas: Tensor) -> Tensor:
            shown = not task.levels or crest * (knob.value or step) * (task.levels - 1) >= 1
            return fit(task, deltas, None if shown else thresholds)

        delta = candidate = direction = torch.zeros_like(task.image)[None]

        def aside(length: float) -> Tensor:
            return sent(delta + length * directions.another())

        def along(sign: int) -> Tensor:
            nonlocal candidate
            candidate = shorten(task, delta + sign * (knob.value or step) * direction)
            return sent(candidate)

        def onward() -> Tensor:
            nonlocal direction
            direction = directions.next()
            return along(+1)

        yield from climb.start(task.image[None])
        clean = climb.value
        while True:
            for sign in (+1, -1):
                row = onward() if sign > 0 else along(-1)
                if sign > 0 and row.equal(climb.row):
                    continue
                won = yield from climb.challenge(row, onward if sign > 0 else None)
                delta = candidate if won else delta
                if task.epsilon is None and climb.reached and (delta.any() or not task.stochastic):
                    step /= 2
                    if knob.value or step < least:
                        return
                    directions, delta = Directions(task, self.basis, self.factor), torch.zeros_like(delta)
                    climb.row, climb.value = task.image[None], clean
                    break
                if won:
                    break


class Directions:
    """The basis Q in the order in which it is used, as images [1,C,H,W] of l2 length 1.

    Args:
        task: the image's shape and its random stream.
        basis: pixel or dct.
        factor: dct: by how much the first block is smaller than the image; None: as the attack's default.
    """

    def __init__(self, task: Task, basis: Basis, factor: float | None) -> None:
        self._shape, self._basis, self._generator = task.image.shape, basis, task.generator
        channels, *size = self._shape
        factor = factor or (8.0 if min(size) >= LARGE else 1.0)
        level = torch.zeros(size, dtype=torch.long)
        if basis == "dct":
            for axis, length in enumerate(size):
                block = max(int(length / factor), 1)
                beyond = (torch.arange(length) - block).div(max(block // 4, 1), rounding_mode="floor") + 1
                level = torch.maximum(level, beyond.view(-1, 1) if axis == 0 else beyond)
        level = level.flatten().repeat(channels)
        self._rings = [(level == k).nonzero().flatten() for k in range(int(level.max()) + 1)]
        self._ring = self._rings[0]
        self._order = self._forever()

    def next(self) -> Tensor:
        """The next direction."""
        return self._image(next(self._order))

    def another(self) -> Tensor:
        """A direction like the next one, which stays where it is in the order."""
        ring, device = self._ring, self._generator.device
        return self._image(int(ring[int(torch.randint(len(ring), (1,), generator=self._generator, device=device))]))

    def _forever(self) -> Iterator[int]:
        while True:
            for ring in self._rings:
                self._ring = ring
                order = torch.randperm(len(ring), generator=self._generator, device=self._generator.device)
                yield from ring[order.cpu()].tolist()

    def _image(self, index: int) -> Tensor:
        channels, height, width = self._shape
        direction = torch.zeros(1, channels, height, width, device=self._generator.device)
        if self._basis == "pixel":
            direction.view(-1)[index] = 1
        else:
            channel, row, column = index // (height * width), index // width % height, index % width
            down, across = (dct_matrix(size, direction.device) for size in (height, width))
            torch.outer(down[row], across[column], out=direction[0, channel])
        return direction
