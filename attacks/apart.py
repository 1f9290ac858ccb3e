"""Noise that asks what was not asked lately: each row is orthogonal to the rows before it (ours).

A normal n = C^(1/2) z with z ~ N(0, I) is asked by sign <z, w>, where w is the noise in whitened coefficients. After q signs
under independent noise in d dimensions, the share 1 / (1 + 2 q / (pi d)) of z is unknown: much of what is asked late was asked
before. Where the w are orthogonal it is 1 - 2 q / (pi d): at q = d / 2, the cosine of n and its estimate is 0.56, not 0.49.

Water-filling makes the dimensions about as many as the queries, so this holds in large images too. Since boundaries turn and
evidence fades, rows are orthogonal to those lately asked alone; since variances differ, they are so in units of the noise
(w = sqrt(c s) g for variances c of the normal and s of the noise: the g are orthogonal).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import Blocks

FULL = 0.7
"""The share of the dimensions from which on the oldest direction is forgotten: what is left would be too few to choose from."""
HELD_BYTES = 2**20
"""Memory of the directions that a search keeps: 341 of 768 coefficients."""


def orthonormal(drawn: Tensor, kept: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows [n,d] made orthonormal to one another and to those that were kept, a quarter of the dimensions at a time.

    Args:
        kept: orthonormal rows [m,d], the oldest first.
        most: how many of the last rows to be orthogonal to and to keep.

    Returns:
        Those rows [n,d], and what to keep.
    """
    parts = []
    for part in drawn.split(max(drawn.shape[1] // 4, 1)):
        kept = kept[max(len(kept) + len(part) - most, 0) :]
        rows, triangle = torch.linalg.qr((part - (part @ kept.T) @ kept).T)
        parts.append(rows.T * triangle.diagonal().sign()[:, None])
        kept = torch.cat([kept, parts[-1]])
    return torch.cat(parts), kept[max(len(kept) - most, 0) :]


class Asked:
    """Directions that rows asked lately, orthonormal, in units of the noise's standard deviation a coefficient.

    Args:
        basis: of the coefficients.
        like: an image [C,H,W].
    """

    def __init__(self, basis: Blocks, like: Tensor) -> None:
        self.basis, self._shape = basis, like.shape
        self._live = torch.arange(0, device=like.device)
        self._kept = like.new_zeros(0, 0)
        self._next = self._live, self._kept

    def sample(
        self, n: int, variances: Tensor, across: Sequence[Tensor], generator: torch.Generator, noted: bool = True
    ) -> Tensor:
        """Noise [n,C,H,W] orthogonal to what was asked and to its own rows, where there are dimensions enough.

        Args:
            variances: of its coefficients [C,H,W]; what was asked of those that have none is forgotten.
            across: images [1,C,H,W], orthogonal to one another, along which it is to have no part.
            noted: whether it is what `keep` then takes in.
        """
        live = variances.flatten().nonzero()[:, 0]
        size, root = len(live), variances.flatten()[live].sqrt()
        most = min(int(FULL * size), HELD_BYTES // (size * root.element_size()))
        drawn = torch.randn(n, size, generator=generator, device=generator.device)
        rows, kept = orthonormal(drawn, self._restricted(live), most)
        if noted:
            self._next = live, kept
        u = rows.new_zeros(n, math.prod(self._shape))
        u.index_copy_(1, live, rows * (root * math.sqrt(size)))
        u = self.basis.compose(u.view(n, *self._shape))
        for direction in across:
            unit = F.normalize(direction.flatten(), dim=0)
            u -= (u.flatten(1) @ unit).view(-1, 1, 1, 1) * unit.view_as(direction)
        return u

    def keep(self) -> None:
        """Take in that the noise of the last `sample` that was noted was asked."""
        self._live, self._kept = self._next

    def _restricted(self, live: Tensor) -> Tensor:
        """The directions in these coefficients alone, by their numbers."""
        place = torch.full((math.prod(self._shape),), len(self._live), device=live.device)
        place[self._live] = torch.arange(len(self._live), device=live.device)
        kept = F.pad(self._kept, (0, 1))  # a column of zeros for those that are new
        return kept.index_select(1, place[live])
