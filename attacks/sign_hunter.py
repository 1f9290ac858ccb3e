"""SignHunter (Al-Dujaili, O'Reilly: Sign Bits Are All You Need for Black-Box Attacks, ICLR 2020).

Every value of the image is moved by the same size up or down: with n sign bits s, the rows are x + epsilon s in linf and
x + epsilon s / sqrt(n) in l2. Divide and conquer (Algorithm 1): at level h = 0, 1, ... the bits fall into chunks of
ceil(n / 2^h); one chunk after the other is turned over, and turned back unless the loss falls. The last level turns single
bits: a loss that is linear in the bits is minimal after one pass over all levels. Bits follow each other as the image is
read, line by line and the channels of a pixel together (as in the authors' experiments), so that chunks are bands.

Query cost: 1 row for the start (all bits up) and 1 row a chunk, 2 where answers are stochastic (`climb.py`); a pass has
sum_h ceil(n / ceil(n / 2^h)) chunks for h = 0, ..., ceil(log2 n), less than 4 n.

Knobs: `chunk`, the least length of a chunk, 1 to n / 2; a pass ends before the level that falls below. A refused row is drawn
again: a chunk of the same length anywhere, which takes its place. A refused start is drawn again at random bits.

Deviations from the paper:

- Passes after the first divide the bits from a random place on, where the authors' code turns the same chunks again around the
  point reached, and leaves the ball.
- The loss is the margin, which still tells rows apart where the probability rounds to 1; `loss=cross-entropy` is the paper's.
- Rows are clipped to the box. On an 8-bit interface the size is rounded down to whole levels in linf; in l2 it is of k levels
  or k + 1, at random, so that rows fill the ball, and where k is 0 the values that would not move have no bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.protocol import Attack, Knob, Norm, Search, Task

from .balls import edge, whole
from .climb import Climb
from .losses import Loss, check_loss


@dataclass(frozen=True)
class SignHunter(Attack):
    """SignHunter: divide and conquer over the signs of the perturbation. Knows scores, needs epsilon.

    Args:
        loss: margin, cross-entropy (the paper's) or probability.
    """

    name: ClassVar[str] = "sign-hunter"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    needs_epsilon: ClassVar[bool] = True
    knobs: ClassVar[tuple[str, ...]] = ("chunk",)

    loss: Loss = "margin"

    def __post_init__(self) -> None:
        check_loss(self.loss)

    def search(self, task: Task) -> Search:
        bits = Bits(task)
        knob = Knob("chunk", 1, max(bits.n // 2, 1), lambda value, n: many(round(value), n), integer=True)
        climb = Climb(task, self.loss, (knob,))

        def anywhere(length: int) -> Tensor:
            return bits.turned(climb.row, bits.place(), length)

        def many(length: int, n: int) -> Tensor:
            return torch.cat([anywhere(length) for _ in range(n)])

        row = bits.up
        while not (yield from climb.start(row, bits.random)):
            row = bits.random()
        first: int | Tensor = 0
        while True:
            for start, length in chunks(bits.n, knob):
                yield from climb.challenge(bits.turned(climb.row, first + start, length), partial(anywhere, length))
            first = bits.place()


def chunks(n: int, knob: Knob) -> Iterator[tuple[int, int]]:
    """The chunks (start, length) of one pass over n bits, level by level; none shorter than the knob after the first."""
    for level in range(math.ceil(math.log2(n)) + 1):
        length = math.ceil(n / 2**level)
        for start in range(0, n, length):
            if level and length < (knob.value or 1):
                return
            yield start, min(length, n - start)


def _sizes(task: Task) -> float | Tensor:
    """By how much each value changes: a number, or [C,H,W] where whole grey levels of two sizes fill the l2 ball."""
    assert task.epsilon is not None  # needs_epsilon
    if task.norm == "linf":
        return whole(task, task.epsilon)
    image, root = task.image, math.sqrt(task.image.numel())
    if not task.levels:
        return task.epsilon / root
    size = edge(task.epsilon) / root * (task.levels - 1)
    least = math.floor(size)
    larger = int((size**2 - least**2) / (2 * least + 1) * image.numel())
    order = torch.rand(image.numel(), generator=task.generator, device=image.device).argsort()
    return (least + (order < larger).view_as(image).float()) / (task.levels - 1)


class Bits:
    """Rows [1,C,H,W] whose values are the image's moved up or down by a size; bits are numbered as values are read.

    Attributes:
        n: number of bits: C H W, fewer where not all can move by a grey level within the ball.
        up: the row whose bits are all up.
    """

    def __init__(self, task: Task) -> None:
        sizes = _sizes(task)
        self.up, self._down = ((task.image + change).clamp_(0, 1)[None] for change in (sizes, -sizes))
        moving = (self.up != self._down)[0].permute(1, 2, 0)
        self.n = int(moving.sum())
        self._generator = task.generator
        self._order = moving.flatten().cumsum(0).sub_(1).view_as(moving).permute(2, 0, 1)

    def turned(self, row: Tensor, start: int | Tensor, length: int) -> Tensor:
        """The row with `length` bits turned over, from bit `start` on; the last is followed by the first."""
        other = torch.where(row == self.up, self._down, self.up)
        return torch.where((self._order - start) % self.n < length, other, row)

    def place(self) -> Tensor:
        """A random bit: int64 [1]."""
        return torch.randint(self.n, (1,), generator=self._generator, device=self._generator.device)

    def random(self) -> Tensor:
        """A row with random bits."""
        coins = torch.randint(2, self.up.shape, generator=self._generator, device=self._generator.device)
        return torch.where(coins > 0, self.up, self._down)
