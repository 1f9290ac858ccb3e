"""The sampling subspaces: dimension, scale, and where their noise lives."""

from __future__ import annotations

import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from robustbox.attacks.subspaces import Subspace, dct_matrix, sampler
from robustbox.errors import InputError

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 12, 20)]
DIMENSIONS = {"full": 3 * 12 * 20, "dct": 3 * 3 * 5, "fft": 3 * 3 * 5, "grid": 3 * 3 * 5, "tiles": 3 * 3 * 5}


def draw(subspace: Subspace, shape: tuple[int, int, int], factor: float, n: int, seed: int = 0) -> Tensor:
    return sampler(subspace, shape, factor, torch.Generator().manual_seed(seed))(n)


@pytest.mark.parametrize("subspace", DIMENSIONS)
def test_dimension(subspace: Subspace) -> None:
    rows = draw(subspace, (3, 12, 20), 4, 900).flatten(1).double()
    assert torch.linalg.matrix_rank(rows, rtol=1e-5) == DIMENSIONS[subspace]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("subspace", DIMENSIONS)
def test_mean_square_is_one_in_every_subspace(subspace: Subspace, shape: tuple[int, int, int]) -> None:
    rows = draw(subspace, shape, 4, 400)
    assert rows.shape == (400, *shape)
    assert rows.dtype == torch.float32
    assert rows.square().mean().item() == pytest.approx(1, abs=0.06)
    assert rows.mean().abs().item() < 0.05


@pytest.mark.parametrize(("shape", "factor"), [((3, 32, 32), 4), ((1, 28, 28), 3), ((3, 12, 20), 2.5)])
def test_dct_noise_is_zero_outside_its_block(shape: tuple[int, int, int], factor: float) -> None:
    h, w = int(shape[1] / factor), int(shape[2] / factor)
    coefficients = torch.from_numpy(dctn(draw("dct", shape, factor, 20).double().numpy(), axes=(2, 3), norm="ortho"))
    block = coefficients[:, :, :h, :w].clone()
    coefficients[:, :, :h, :w] = 0
    assert coefficients.abs().max() < 1e-5
    assert (block.abs() > 1e-4).double().mean() > 0.99


def test_fft_noise_is_zero_above_its_frequencies() -> None:
    spectrum = torch.fft.fft2(draw("fft", (1, 16, 24), 4, 50).double()).abs().amax(dim=(0, 1))
    rows, columns = torch.fft.fftfreq(16, 1 / 16).abs(), torch.fft.fftfreq(24, 1 / 24).abs()
    kept = (rows[:, None] <= 2) & (columns <= 3)
    assert spectrum[~kept].max() < 1e-4
    assert spectrum[kept].min() > 1


def test_grid_is_constant_in_cells_and_tiles_repeat() -> None:
    grid = draw("grid", (2, 12, 20), 4, 5)
    cells = grid.unfold(2, 4, 4).unfold(3, 4, 4)
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells))
    tiles = draw("tiles", (2, 12, 20), 4, 5)
    assert torch.equal(tiles[:, :, 3:], tiles[:, :, :-3])
    assert torch.equal(tiles[..., 5:], tiles[..., :-5])
    uneven = draw("grid", (1, 28, 28), 28 / 12, 3)
    assert all(len(row.unique()) == 12 * 12 for row in uneven)


@pytest.mark.parametrize("subspace", DIMENSIONS)
def test_factor_one_is_white_noise(subspace: Subspace) -> None:
    assert torch.equal(draw(subspace, (3, 8, 10), 1, 4), draw("full", (3, 8, 10), 1, 4))


def test_a_factor_beyond_the_image_leaves_one_coefficient() -> None:
    rows = draw("dct", (2, 6, 8), 100, 3)
    assert torch.allclose(rows, rows[..., :1, :1].expand_as(rows), atol=1e-6)


def test_dct_matrix_is_orthonormal() -> None:
    matrix = dct_matrix(33, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.T, torch.eye(33), atol=1e-6)
    assert dct_matrix(33, torch.device("cpu")) is matrix


def test_noise_comes_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(draw("dct", (3, 8, 8), 2, 4, seed=5), draw("dct", (3, 8, 8), 2, 4, seed=5))
    assert not torch.equal(draw("dct", (3, 8, 8), 2, 4, seed=5), draw("dct", (3, 8, 8), 2, 4, seed=6))
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_subspace() -> None:
    with pytest.raises(InputError, match="unknown subspace 'dtc': did you mean dct"):
        draw("dtc", (3, 8, 8), 2, 1)  # type: ignore[arg-type]
