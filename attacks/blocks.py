"""Images as cosine waves in blocks: an orthonormal basis whose every vector has a colour, a frequency and a place.

An image [C,H,W] is cut into blocks of about `side` pixels along each axis; the coefficients are those of a DCT-II across the
channels (of three: grey, first minus last, the middle against both) and along both axes of each block. They have the shape of
the image: the waves of a block stand where its pixels stood.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .subspaces import dct_matrix

SIDE, LARGE = 4, 64
"""Pixels of a block's side; twice as many in images of at least LARGE pixels a side."""


class Blocks:
    """The basis for images of a shape (C, H, W).

    Attributes:
        cycles: how often a wave of each coefficient would go up and down across the whole image, [H,W].
        away: squared distance of its block from the middle of the image, 1 at the middle of a border, [H,W].
        cell: which of 4 x 4 cells of the image its block stands in, [H,W].
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        channels, height, width = shape
        side = SIDE if min(height, width) < LARGE else 2 * SIDE
        self._colour = dct_matrix(channels, device)
        self._rows, y, cy = _axis(height, side, device)
        self._columns, x, cx = _axis(width, side, device)
        self.cycles = torch.hypot(cy[:, None], cx)
        self.away = 4 * ((y - 0.5).square()[:, None] + (x - 0.5).square())
        self.cell = (4 * y).long()[:, None] * 4 + (4 * x).long()

    def analyse(self, images: Tensor) -> Tensor:
        """The coefficients of images [n,C,H,W]."""
        waves = _along(_along(images, self._rows, 2), self._columns, 3)
        return self._mixed(waves, self._colour)

    def compose(self, coefficients: Tensor) -> Tensor:
        """The images of coefficients [n,C,H,W]."""
        waves = self._mixed(coefficients, self._colour.T)
        return _along(_along(waves, self._rows.mT, 2), self._columns.mT, 3)

    @staticmethod
    def _mixed(images: Tensor, matrix: Tensor) -> Tensor:
        return (matrix @ images.flatten(2)).view_as(images) if len(matrix) > 1 else images


@lru_cache(maxsize=16)
def blocks(shape: tuple[int, int, int], device: torch.device) -> Blocks:
    """The basis of a shape, made once."""
    return Blocks(shape, device)


def _axis(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the transform of a block where all are of one size [b,b], else of the whole axis [size,size]; of each
    coefficient the place of its block in [0, 1] and its cycles an image, [size]."""
    count = max(round(size / side), 1)
    if size % side and size <= LARGE:  # short enough for a dense transform
        edges = [round(k * size / count) for k in range(count + 1)]
    else:  # all of one size: the divisor of the axis that is nearest to the side wished
        best = min((b for b in range(1, size + 1) if size % b == 0), key=lambda b: (abs(b - side), b))
        edges = [*range(0, size + 1, best)]
    spans = [*pairwise(edges)]
    alike = len({end - start for start, end in spans}) == 1
    parts = [dct_matrix(end - start, device) for start, end in spans]
    matrix = parts[0] if alike else torch.block_diag(*parts)
    place = torch.cat([torch.full((end - start,), (start + end) / 2 / size) for start, end in spans])
    cycles = torch.cat([torch.arange(end - start) * (size / 2 / (end - start)) for start, end in spans])
    return matrix, place.to(device), cycles.to(device)


def _along(images: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """A matrix [b,b] applied to all stretches of b pixels along an axis (2: rows, 3: columns) of images [n,C,H,W]."""
    n, channels, height, width = images.shape
    size = len(matrix)
    if axis == 3:
        return (images.reshape(-1, size) @ matrix.T).view_as(images)
    return (matrix @ images.reshape(n * channels, height // size, size, width)).view(images.shape)
