"""Random directions of low frequency that are orthogonal to one another, as SurFree draws them (`surfree.py`)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.protocol import Task

from .subspaces import Sampler, dct_matrix, inverse_dct

Basis = Literal["dct", "dct-8x8"]
Weights = Literal["constant", "tanh"]

BLOCK = 8
FAINT = 0.01
"""Least weight of a frequency under `tanh`."""
MEMORY_BYTES = 16 * 2**20
"""Memory of the directions that a search remembers: 27 of 3 x 224 x 224."""


class Directions:
    """Draws directions of length 1 that are orthogonal to a ray and to the last directions remembered.

    Args:
        image: [C,H,W].
        sample: draws n directions [n,C,H,W] before any of this.
        dimensions: of the space in which they lie.
        memory: how many are remembered: at most half of the dimensions, and what `MEMORY_BYTES` hold.
    """

    def __init__(self, image: Tensor, sample: Sampler, dimensions: int, memory: int) -> None:
        size = min(memory, dimensions // 2, MEMORY_BYTES // (4 * image.numel()))
        self._sample, self._kept, self._seen = sample, image.new_empty(size, image.numel()), 0

    def draw(self, ray: Tensor, n: int) -> Tensor:
        """n directions [n,C,H,W]; 0 where the space holds no other."""
        kept = self._kept[: self._seen]
        drawn = self._sample(n)
        rows = torch.cat([drawn, F.normalize(ray.flatten(1)).view_as(ray)]).flatten(1)
        rows = rows - (rows @ kept.T) @ kept
        # Old directions were forgotten: the ray is not in the span of what is kept, nor orthogonal to it. This is what is left.
        rest = F.normalize(rows[n], dim=0, eps=1e-5)
        rows = rows[:n] - (rows[:n] @ rest)[:, None] * rest
        return F.normalize(rows, eps=1e-5).view_as(drawn)

    def remember(self, direction: Tensor) -> None:
        """Keep a direction [1,C,H,W] that was drawn, in the place of the oldest."""
        if len(self._kept):
            self._kept[self._seen % len(self._kept)] = direction.flatten()
            self._seen += 1


def proposal(task: Task, basis: Basis, frequencies: float, weights: Weights) -> tuple[Sampler, int]:
    """Draws the A r of SurFree's docstring [n,C,H,W], of no particular length; and the dimensions in which they lie.

    Frequencies (i, j) of a block of h x w pixels are ordered by i / h + j / w. Images are padded to whole blocks.
    """
    image, generator = task.image, task.generator
    channels, height, width = image.shape
    block = (height, width) if basis == "dct" else (BLOCK, BLOCK)
    down, across = -(-height // block[0]), -(-width // block[1])
    i, j = (torch.arange(side, device=image.device) / side for side in block)
    order = (i[:, None] + j).flatten().argsort(stable=True)
    amplitudes = torch.zeros_like(order, dtype=torch.float32)
    amplitudes[order[: max(round(frequencies * len(order)), 1)]] = 1
    amplitudes = amplitudes.view(block).expand(channels * down * across, *block)
    if weights == "tanh":
        padding = (0, across * block[1] - width, 0, down * block[0] - height)
        padded = F.pad(image[None], padding, mode="replicate").view(channels, down, block[0], across, block[1])
        rows, columns = (dct_matrix(side, image.device) for side in block)
        held = rows @ padded.transpose(2, 3).reshape(-1, *block) @ columns.T
        # The authors' DCT is unnormalised: that many times larger. What the image lacks is not quite left out, or a flat
        # image would leave one direction a channel.
        amplitudes = amplitudes * (2 * math.sqrt(block[0] * block[1]) * held).abs().tanh().clamp_min(FAINT)

    def sample(n: int) -> Tensor:
        signs = torch.randint(-1, 2, (n, *amplitudes.shape), generator=generator, device=generator.device)
        drawn = inverse_dct(signs * amplitudes, block).view(n, channels, down, across, *block)
        return drawn.transpose(3, 4).reshape(n, channels, down * block[0], across * block[1])[..., :height, :width]

    return sample, int(amplitudes.count_nonzero())
