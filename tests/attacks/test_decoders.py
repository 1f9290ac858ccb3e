"""Decoders are linear, as wide as they say, and lose nothing that they promise to keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbox.attacks.decoders import DecoderName, decoder
from robustbox.attacks.subspaces import dct_matrix
from robustbox.errors import InputError

NAMES: tuple[DecoderName, ...] = ("dct", "nni", "fft")


def matrix(name: DecoderName, shape: tuple[int, int, int], size: int) -> Tensor:
    """The decoder's images of the unit vectors, [dim, C H W]."""
    decode = decoder(name, shape, size)
    return decode(torch.eye(decode.dim)).flatten(1)


@pytest.mark.parametrize("name", NAMES)
def test_decoders_are_linear_and_keep_the_shape(name: DecoderName) -> None:
    shape, generator = (3, 12, 16), torch.Generator().manual_seed(0)
    decode = decoder(name, shape, 4)
    a, b = torch.randn(2, 5, decode.dim, generator=generator)
    assert decode(a).shape == (5, *shape)
    torch.testing.assert_close(decode(2 * a - 3 * b), 2 * decode(a) - 3 * decode(b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_dct_is_an_isometry_onto_the_lowest_frequencies(channels: int) -> None:
    basis = matrix("dct", (channels, 10, 14), 4)
    assert len(basis) == channels * 16
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    images = basis.view(-1, channels, 10, 14)
    spectrum = dct_matrix(10, images.device) @ images @ dct_matrix(14, images.device).T
    assert spectrum[..., 4:, :].abs().max() < 1e-5
    assert spectrum[..., 4:].abs().max() < 1e-5


def test_dct_holds_both_diagonals_and_the_paper_s_fft_only_one() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    one, other = (torch.cos(2 * torch.pi * (2 * y + sign * 2 * x) / 16).flatten() for sign in (1, -1))

    def share(name: DecoderName, size: int, grating: Tensor) -> float:
        """The part of a grating's energy within the decoder's span."""
        U, S, _ = torch.linalg.svd(matrix(name, (1, 16, 16), size).double().T, full_matrices=False)
        span = U[:, S / S[0] > 1e-6]
        return float((span.T @ grating.double()).norm() ** 2 / grating.norm() ** 2)

    assert share("fft", 4, one) == pytest.approx(1, abs=1e-6)
    assert share("fft", 4, other) == pytest.approx(0, abs=1e-6)
    assert share("dct", 6, one) == pytest.approx(share("dct", 6, other), abs=1e-3)
    assert share("dct", 6, one) > 0.95


@pytest.mark.parametrize(("channels", "size"), [(1, 3), (1, 5), (3, 3), (3, 4)])
def test_fft_has_the_rank_of_the_reference(channels: int, size: int) -> None:
    basis = matrix("fft", (channels, 16, 16), size).double()
    assert len(basis) == 2 * channels * size**2
    assert int(torch.linalg.matrix_rank(basis, rtol=1e-5)) == 2 * channels * size**2 - channels


def test_fft_is_refused_where_the_half_spectrum_is_too_small() -> None:
    assert decoder("fft", (1, 8, 20), 4).dim == 32
    with pytest.raises(InputError, match="at most size 4 for images of 8 x 20"):
        decoder("fft", (1, 8, 20), 5)


@pytest.mark.parametrize("side", [28, 30, 12])
def test_nni_shows_every_cell_and_nothing_else(side: int) -> None:
    decode = decoder("nni", (2, side, 28), 12)
    cells = torch.arange(2 * 144.0)[None]
    image = decode(cells)[0]
    for channel in range(2):
        assert image[channel].unique().tolist() == cells[0, 144 * channel :][:144].tolist()
    heights = (image[0, :, 0].unique(return_counts=True))[1]
    assert int(heights.max() - heights.min()) <= 1


@pytest.mark.parametrize("name", ["dct", "nni"])
def test_a_size_beyond_the_image_is_the_whole_image(name: DecoderName) -> None:
    assert decoder(name, (1, 5, 7), 50).dim == 35
    assert int(torch.linalg.matrix_rank(matrix(name, (1, 5, 7), 50))) == 35


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown decoder 'dtc': did you mean dct"):
        decoder("dtc", (1, 8, 8), 2)  # type: ignore[arg-type]
