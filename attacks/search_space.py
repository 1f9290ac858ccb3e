"""The directions among which Bayesian optimisation searches (`bayes_subspace.py`), and the rows that belong to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.distances import distance
from robustbox.protocol import Task

from .decoders import Decoder
from .levels import dither
from .random import Rays

WINDOW = 500
"""Directions that are remembered as asked."""
GLOBAL, LOCAL, SPREADS, CORNERS = 64, 32, (0.1, 0.3, 1.0), (0.45, 0.6, 1.0)
"""Where an acquisition function is tried first: random directions, and so many at each spread around the best; between
corners of the cube the spreads at which 1, 5 and 16 % of the cells change sides."""


class SearchSpace:
    """The directions that may be asked, and the rows that belong to them. Directions are float64 [n,dim] on the host.

    Attributes:
        asked: the directions of the last rows, refused ones too, [at most WINDOW,dim].
        corners: whether only the corners of the cube are admitted.

    Args:
        task: the image, its norm and its random stream.
        decode: from directions to images.
        signs: in linf, every value is moved up or down by the whole radius.
        corners: only the corners of the cube are admitted.
        sobol: whether designs are those of a Sobol sequence.
    """

    def __init__(self, task: Task, decode: Decoder, signs: bool, corners: bool, sobol: bool) -> None:
        self._task, self._decode, self._signs, self.corners = task, decode, signs, corners
        self.dim, self._thresholds = decode.dim, dither(task) if task.norm == "l2" else None
        self.asked = torch.empty(0, self.dim, dtype=torch.float64)
        self._sobol: torch.quasirandom.SobolEngine | None = None
        if sobol:
            device = task.generator.device
            seed = int(torch.randint(2**31, (1,), generator=task.generator, device=device))
            self._sobol = torch.quasirandom.SobolEngine(self.dim, scramble=True, seed=seed)

    def admit(self, vectors: Tensor) -> Tensor:
        """The admissible directions, of length 1, that belong to any vectors [...,dim]; to 0, which in 1 dimension
        is not rare, the diagonal.
        """
        some = torch.where(vectors.any(dim=-1, keepdim=True), vectors, 1.0)
        return F.normalize(_sign(vectors) if self.corners else some, dim=-1)

    def design(self, n: int) -> Tensor:
        """The next n directions of the blind design: uniform in the cube, or a Sobol sequence there."""
        cube = self._sobol.draw(n, dtype=torch.float64) if self._sobol else self._draw(torch.rand, n)
        return self.admit(2 * cube - 1)

    def starts(self, best: Tensor) -> Tensor:
        """Directions from which to climb: anywhere, around the best one [dim], and the best one itself."""
        normals = F.normalize(self._draw(torch.randn, GLOBAL + LOCAL * len(SPREADS)), dim=1)
        spreads = normals.new_tensor(CORNERS if self.corners else SPREADS).repeat_interleave(LOCAL)[:, None]
        return self.admit(torch.cat([normals[:GLOBAL], best + spreads * normals[GLOBAL:], best[None]]))

    def rows(self, points: Tensor, radius: float) -> Tensor:
        """The image moved along directions by a radius, clipped to the box: float32 [n,C,H,W] on the image's device.

        The directions count as asked from then on.
        """
        task = self._task
        self.asked = torch.cat([self.asked, points])[-WINDOW:]
        deltas = self._decode(points.to(torch.float32).to(task.image.device))
        if task.norm == "linf":
            rms = deltas.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
            deltas = _sign(deltas) if self._signs else (deltas / rms).clamp_(-1, 1)
        lengths = distance(deltas, task.norm)
        limits = torch.full_like(lengths, math.inf)
        return Rays(task, deltas, None, lengths, limits, self._thresholds).at(radius)

    def _draw(self, distribution: Callable[..., Tensor], n: int) -> Tensor:
        generator = self._task.generator
        drawn = distribution(n, self.dim, generator=generator, device=generator.device)
        return drawn.cpu().double()


def _sign(values: Tensor) -> Tensor:
    """+1 or -1, never 0."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)
