"""From a few numbers to a perturbation of the whole image: the subspaces in which `bayes-subspace` searches.

A decoder is a linear map from a latent vector [dim] to an image [C,H,W]. Only directions matter to the search: it scales
what comes out. With n = `size`, h = min(n, H) and w = min(n, W):

    dct  the h x w lowest frequencies of each channel, orthonormal 2-D DCT-II; an isometry           dim = C h w
    nni  a grid of h x w cells a channel, enlarged to the nearest cell                               dim = C h w
    fft  a block of the 3-D Fourier transform, channels included, as BayesAttack's code has it       dim = 2 C n n

The fft block (Shukla et al. 2021; github.com/satyanshukla/bayes_attack, utils.py) holds the frequencies 0 to n - 1 of both
axes, cosine and sine parts, and is read as the half spectrum of a real image. Its image has only 2 C n^2 - C dimensions
(-1 at C = 1, -3 at C = 3): some of the sine parts of the lowest column are lost. It lacks the gratings of one diagonal,
since frequencies of different signs along the two axes are not in the block, and it mixes channels. `dct` has neither fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustbox.errors import InputError, unknown_name

from .subspaces import enlarge, inverse_dct

DecoderName = Literal["dct", "nni", "fft"]


@dataclass(frozen=True)
class Decoder:
    """A linear map from latent vectors to images.

    Args:
        dim: length of a latent vector.
        decode: latent vectors [n,dim] to images [n,C,H,W], on their device and in their precision.
    """

    dim: int
    decode: Callable[[Tensor], Tensor]

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [n,C,H,W] of latent vectors [n,dim]."""
        return self.decode(latents)


def decoder(name: DecoderName, shape: tuple[int, int, int], size: int) -> Decoder:
    """The decoder of a name for images of `shape` (C, H, W).

    Raises:
        InputError: no such decoder, or an fft block that does not fit into the image's half spectrum.
    """
    if name not in _BUILD:
        raise unknown_name("decoder", name, _BUILD)
    return _BUILD[name](shape, size)


def _dct(shape: tuple[int, int, int], size: int) -> Decoder:
    channels, height, width = shape
    h, w = min(size, height), min(size, width)
    return Decoder(channels * h * w, lambda z: inverse_dct(z.view(-1, channels, h, w), (height, width)))


def _nni(shape: tuple[int, int, int], size: int) -> Decoder:
    channels, height, width = shape
    h, w = min(size, height), min(size, width)
    return Decoder(channels * h * w, lambda z: enlarge(z.view(-1, channels, h, w), (height, width)))


def _fft(shape: tuple[int, int, int], size: int) -> Decoder:
    channels, height, width = shape
    most = min(height, width) // 2
    if size > most:
        raise InputError(f"decoder fft takes at most size {most} for images of {height} x {width}, got {size}")

    def decode(latents: Tensor) -> Tensor:
        cos, sin = latents.view(-1, 2, channels, size, size).unbind(1)
        spectrum = torch.zeros(len(latents), channels, height, width // 2 + 1, dtype=torch.complex(cos, sin).dtype)
        spectrum = spectrum.to(latents.device)
        spectrum[..., :size, :size] = torch.complex(cos, sin)
        images: Tensor = torch.fft.irfftn(spectrum, s=shape, dim=(1, 2, 3), norm="ortho")
        return images

    return Decoder(2 * channels * size * size, decode)


_BUILD: dict[str, Callable[[tuple[int, int, int], int], Decoder]] = {"dct": _dct, "nni": _nni, "fft": _fft}
