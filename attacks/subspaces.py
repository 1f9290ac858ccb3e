"""Where an attack draws its noise: the whole image, or a subspace of smooth or coarse patterns with fewer dimensions.

Every subspace is linear and every sampler draws Gaussian noise in it, scaled so that the mean square over the pixels is 1
in expectation: a noise scale sigma means the same, in units of one pixel, in all of them. For images [C,H,W] and a factor
f >= 1 with h = floor(H/f), w = floor(W/f) (at least 1):

    full   N(0, 1) on every pixel and channel                                        C H W dimensions
    dct    the h x w lowest frequencies of the orthonormal 2-D DCT-II                C h w  (QEBA, GeoDA, CGBA)
    fft    the frequencies |k_y| <= h/2, |k_x| <= w/2 of the 2-D Fourier transform   about C h w, periodic
    grid   an h x w grid, enlarged to the nearest cell                               C h w  (NNI of BayesAttack)
    tiles  one h x w pattern, repeated over the image                                C h w

All of them are `full` at f = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from robustbox.errors import unknown_name

Subspace = Literal["full", "dct", "fft", "grid", "tiles"]
Sampler = Callable[[int], Tensor]
"""Draws n rows of noise, float32 [n,C,H,W], from the stream and on the device of its generator."""


def sampler(subspace: Subspace, shape: tuple[int, int, int], factor: float, generator: torch.Generator) -> Sampler:
    """The sampler of a subspace for images of `shape` (C, H, W).

    Raises:
        InputError: no subspace of this name.
    """
    if subspace not in _DRAW:
        raise unknown_name("subspace", subspace, _DRAW)
    draw = _DRAW["full" if factor <= 1 else subspace]
    channels, height, width = shape
    size = max(int(height / factor), 1), max(int(width / factor), 1)

    def noise(n: int, h: int, w: int) -> Tensor:
        return torch.randn(n, channels, h, w, generator=generator, device=generator.device)

    return lambda n: draw(noise, n, size, (height, width))


_Size = tuple[int, int]
_Noise = Callable[[int, int, int], Tensor]


def _full(noise: _Noise, n: int, block: _Size, image: _Size) -> Tensor:
    return noise(n, *image)


def _dct(noise: _Noise, n: int, block: _Size, image: _Size) -> Tensor:
    scale = math.sqrt(image[0] * image[1] / (block[0] * block[1]))
    return inverse_dct(noise(n, *block), image).mul_(scale)


def _fft(noise: _Noise, n: int, block: _Size, image: _Size) -> Tensor:
    white = noise(n, *image)
    keep = _low_pass(block, image, white.device)
    # Of the H x W frequencies, rfft2 stores one of each conjugate pair; the low-pass of a delta counts those kept.
    share = float(torch.fft.irfft2(keep, s=image)[0, 0])
    smooth: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * keep, s=image)
    return smooth.div_(math.sqrt(share))


def _grid(noise: _Noise, n: int, block: _Size, image: _Size) -> Tensor:
    return enlarge(noise(n, *block), image)


def _tiles(noise: _Noise, n: int, block: _Size, image: _Size) -> Tensor:
    tile = noise(n, *block)
    rows, columns = (torch.arange(s, device=tile.device) % b for s, b in zip(image, block, strict=True))
    return tile[:, :, rows[:, None], columns]


_DRAW: dict[str, Callable[[_Noise, int, _Size, _Size], Tensor]] = {
    "full": _full,
    "dct": _dct,
    "fft": _fft,
    "grid": _grid,
    "tiles": _tiles,
}


def inverse_dct(coefficients: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [n,C,H,W] of `size` (H, W) from their lowest DCT-II coefficients [n,C,h,w], float32: an isometry."""
    rows, columns = (dct_matrix(s, coefficients.device) for s in size)
    return rows[: coefficients.shape[2]].T @ coefficients @ columns[: coefficients.shape[3]]


def enlarge(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [n,C,H,W] of `size` (H, W) in which every pixel shows the nearest of the cells [n,C,h,w]."""
    shape = zip(size, cells.shape[2:], strict=True)
    rows, columns = (torch.arange(s, device=cells.device) * b // s for s, b in shape)
    return cells[:, :, rows[:, None], columns]


@lru_cache(maxsize=32)
def dct_matrix(size: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II matrix [size,size]: row k holds frequency k, so that `D @ signal` are its coefficients."""
    k, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (x + 0.5) * k / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, torch.float32)


@lru_cache(maxsize=32)
def _low_pass(block: _Size, image: _Size, device: torch.device) -> Tensor:
    """1 where a frequency of rfft2 is kept, 0 elsewhere: [H, W//2 + 1]."""
    rows: Tensor = torch.fft.fftfreq(image[0], 1 / image[0]).abs() <= block[0] / 2
    columns: Tensor = torch.fft.rfftfreq(image[1], 1 / image[1]) <= block[1] / 2
    return (rows[:, None] & columns).to(device, torch.float32)
