"""GWAD-style detection: not how near queries are to each other, but how they move.

After GWAD (CVPR 2025): whatever the scale of its probes, an attack that draws them independently around a point makes steps
whose cosines crowd at -1/2; antithetic pairs crowd at -0.71, line searches at 1. Queries of unrelated images spread around
-1/2. From a row at 32 x 32 pixels, less its mean:

    d_i = x_i - x_(i-1),   c_i = cos(d_i, d_(i-1))      0 where a step is none
    hit  where the last `length` cosines are distributed otherwise than benign ones: the Kolmogorov-Smirnov distance
         max |F(c) - F_benign(c)| exceeds `threshold`

The earliest hit is query `length` + 2: what an attack reaches before, and what it hides between other queries, goes unseen.

Deviations: a distribution-free statistic, in which nothing is trained, decides instead of a network on a histogram of 201
bins; no screener by edges. F_benign was taken from CIFAR-10 test images in random order, whose streams of 9,000 stay below
0.12 (MNIST's below 0.15; docs/stateful.md).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .gate import Shape, StatefulDefense
from .memory import Memory, Verdict

Thumbnail = NDArray[np.float32]

SIDE = 32
# fmt: off
BENIGN = np.array([
    -0.951, -0.781, -0.735, -0.699, -0.669, -0.640, -0.614, -0.588, -0.563, -0.538, -0.512,
    -0.486, -0.457, -0.427, -0.395, -0.358, -0.317, -0.266, -0.202, -0.104, 0.487,
])
# fmt: on
"""Quantiles of the cosines of unrelated CIFAR-10 images: 0, 5, ... 100 %."""


@dataclass(frozen=True, kw_only=True)
class GWAD(StatefulDefense):
    """GWAD-style (2025): refuses queries while the cosines of an account's last steps are distributed as no benign ones are.

    Args:
        window: changes nothing: what is remembered are the cosines of the last `length` steps.
        length: steps whose cosines are compared with the benign ones (the authors': 256).
        threshold: Kolmogorov-Smirnov distance above which a query is a hit.
    """

    name: ClassVar[str] = "gwad"

    length: int = 256
    threshold: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.length >= 1, f"length must be at least 1, not {self.length}")
        self.require(0 <= self.threshold < 1, f"threshold must be in [0, 1), not {self.threshold}")

    def secret(self, shape: Shape, generator: torch.Generator) -> None:
        """Nothing: everybody can compute this statistic."""

    def prints(self, rows: Tensor, secrets: Sequence[None]) -> Iterable[Thumbnail]:
        """The rows at 32 x 32 pixels, less their means: float32 [values]."""
        small = rows.clamp(0, 1)
        if small.shape[2:] != (SIDE, SIDE):
            small = F.interpolate(small, (SIDE, SIDE), mode="bilinear", antialias=True)
        values: NDArray[np.float32] = small.flatten(1).cpu().numpy()
        return [row - row.mean() for row in values]

    def memory(self, secret: None) -> Memory:
        return StepMemory(self.length, self.threshold)


class StepMemory(Memory):
    """The last query, the last step, and the cosines of the last `length` pairs of steps; `forget` has nothing to do."""

    def __init__(self, length: int, threshold: float) -> None:
        self._threshold = threshold
        self._cosines: deque[float] = deque(maxlen=length)
        self._last: Thumbnail | None = None
        self._step: Thumbnail | None = None
        self._rows = 0

    def judge(self, print: Thumbnail) -> Verdict:
        cosines = [*self._cosines, *self._cosine(print)][-(self._cosines.maxlen or 0) :]
        hit = len(cosines) == self._cosines.maxlen and from_benign(np.array(cosines)) > self._threshold
        return Verdict(hit, self._rows - 1)

    def store(self, print: Thumbnail, verdict: Verdict) -> int:
        self._cosines.extend(self._cosine(print))
        self._step = None if self._last is None else print - self._last
        self._last = print
        self._rows += 1
        return self._rows - 1

    def forget(self, before: int) -> None:
        pass

    @property
    def stored(self) -> int:
        return min(self._rows, len(self._cosines) + 2)

    @property
    def nbytes(self) -> int:
        rows = sum(part.nbytes for part in (self._last, self._step) if part is not None)
        return rows + sys.getsizeof(self._cosines) + sum(map(sys.getsizeof, self._cosines))

    def _cosine(self, print: Thumbnail) -> list[float]:
        """The cosine of the step to this query with the last one; none before the third query."""
        if self._last is None or self._step is None:
            return []
        step = print - self._last
        lengths = float(np.linalg.norm(step)) * float(np.linalg.norm(self._step))
        return [float(step @ self._step) / lengths if lengths else 0.0]


def from_benign(cosines: NDArray[np.float64]) -> float:
    """The Kolmogorov-Smirnov distance of cosines from the benign ones."""
    expected = np.interp(np.sort(cosines), BENIGN, np.linspace(0, 1, len(BENIGN)))
    steps = np.arange(len(cosines) + 1) / len(cosines)
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))
