"""Noise apart: rows are orthogonal to what was asked lately, few are kept, signs tell as much as the formula says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustbox.attacks import apart
from robustbox.attacks.apart import FULL, Asked, orthonormal
from robustbox.attacks.blocks import Blocks, blocks

SHAPE = (3, 8, 8)
BASIS: Blocks = blocks(SHAPE, torch.device("cpu"))
EVEN = torch.ones(SHAPE)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked() -> Asked:
    return Asked(BASIS, torch.zeros(SHAPE))


def whitened(noise: Tensor, variances: Tensor) -> Tensor:
    """Noise in units of its standard deviation a coefficient, [n, coefficients that have some]."""
    live = variances.flatten() > 0
    return BASIS.analyse(noise).flatten(1)[:, live] / variances.flatten()[live].sqrt()


def test_rows_are_orthogonal_to_those_that_were_asked() -> None:
    variances = torch.rand(SHAPE, generator=stream(1)) + 0.1
    noise, generator = asked(), stream()
    rows = []
    for n in (7, 20, 1, 40):
        rows.append(whitened(noise.sample(n, variances, [], generator), variances))
        noise.keep()
    products = torch.cat(rows) @ torch.cat(rows).T / 192
    assert torch.allclose(products, torch.eye(68), atol=1e-4)


def test_what_was_not_asked_does_not_count() -> None:
    """The noise of a query is drawn again where it is too large to be held: the same as before."""
    noise, generator = asked(), stream()
    noise.sample(30, EVEN, [], generator)
    noise.keep()
    state = generator.get_state()
    first = noise.sample(30, EVEN, [], generator)
    generator.set_state(state)
    assert torch.equal(first, noise.sample(30, EVEN, [], generator))


@pytest.mark.parametrize("fewer", [True, False])
def test_rows_that_are_drawn_again_with_other_variances_change_nothing(fewer: bool) -> None:
    """A wrapper sets another length between a draw and a redraw, and so white noise comes in or goes out."""
    some = (torch.rand(SHAPE, generator=stream(1)) > 0.5).float()
    first, second = (EVEN, some) if fewer else (some, EVEN)
    noise, plain = asked(), asked()
    for each in (noise, plain):
        each.sample(30, first, [], stream())
    noise.sample(5, second, [], stream(7), noted=False)
    for each in (noise, plain):
        each.keep()
    assert torch.equal(*(each.sample(10, first, [], stream(3)) for each in (noise, plain)))
    assert torch.equal(*(each.sample(10, second, [], stream(4)) for each in (noise, plain)))


def test_noise_has_its_variances_and_no_part_across() -> None:
    variances = torch.rand(SHAPE, generator=stream(1)) * (torch.rand(SHAPE, generator=stream(2)) > 0.5)
    noise, generator = asked(), stream()
    drawn = torch.cat([noise.sample(40, variances, [], generator) for _ in range(100)])
    found = BASIS.analyse(drawn).square().mean(0)
    assert torch.allclose(found, variances, atol=0.12)
    assert float(found.mean()) == pytest.approx(float(variances.mean()), rel=0.02)
    direction = torch.randn(1, *SHAPE, generator=stream(3))
    left = (
        noise.sample(10, variances, [direction, torch.zeros_like(direction)], generator).flatten(1)
        @ direction.flatten()
    )
    assert float(left.abs().max()) < 1e-4


def test_directions_stay_where_there_still_is_noise() -> None:
    first, second = EVEN.clone(), EVEN.clone()
    first[:, 4:], second[:, :, 4:] = 0, 0
    noise, generator = asked(), stream()
    before = whitened(noise.sample(20, first, [], generator), EVEN)
    noise.keep()
    after = whitened(noise.sample(10, second, [], generator), EVEN)
    both = ((first > 0) & (second > 0)).flatten()
    assert bool((after[:, second.flatten() == 0].abs() < 1e-5).all())
    assert float(before[:, both].norm()) > 1 < float(after[:, both].norm())
    # What is left of 20 rows on half of their coefficients has eigenvalues between 0 and 1: most of it is avoided.
    fresh = torch.randn(10, 192, generator=stream(5)) * second.flatten()
    alike = before[:, both] / before[:, both].norm(dim=1, keepdim=True)
    assert float((after[:, both] @ alike.T).square().sum()) < 0.5 * float((fresh[:, both] @ alike.T).square().sum())


@pytest.mark.parametrize("n", [1, 16, 50, 300])
def test_more_rows_than_dimensions_are_orthogonal_to_the_last_ones(n: int) -> None:
    most = int(FULL * 16)
    rows, kept = orthonormal(torch.randn(n, 16, generator=stream()), torch.zeros(0, 16), most)
    assert rows.shape == (n, 16)
    assert len(kept) <= most
    assert torch.allclose(kept, rows[len(rows) - len(kept) :])
    assert torch.allclose(kept @ kept.T, torch.eye(len(kept)), atol=1e-5)
    for start in range(n - 3):
        last = rows[start : start + 4]
        assert torch.allclose(last @ last.T, torch.eye(len(last)), atol=1e-5)


def test_one_dimension_is_asked_again_and_again() -> None:
    rows, kept = orthonormal(torch.randn(5, 1, generator=stream()), torch.zeros(0, 1), 0)
    assert torch.allclose(rows.abs(), torch.ones(5, 1))
    assert len(kept) == 0


def test_what_is_kept_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "HELD_BYTES", 10 * 192 * 4)
    noise, generator = asked(), stream()
    rows = []
    for _ in range(4):
        rows.append(noise.sample(4, EVEN, [], generator).flatten(1))
        noise.keep()
    assert float((rows[3] @ rows[2].T).abs().max()) < 1e-3
    assert float((rows[3] @ rows[0].T).abs().max()) > 1


@pytest.mark.parametrize("alike", [False, True])
def test_signs_tell_as_much_as_the_formula_says(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if alike:
        monkeypatch.setattr(apart, "orthonormal", lambda drawn, kept, _: (drawn / drawn.shape[1] ** 0.5, kept))
    q, cosines = 96, []
    for seed in range(60):
        generator = stream(seed)
        normal = torch.randn(192, generator=generator)
        noise, told = asked(), torch.zeros(192)
        for _ in range(4):
            u = noise.sample(q // 4, EVEN, [], generator).flatten(1)
            noise.keep()
            told += (u @ normal).sign() @ u
        cosines.append(float(torch.cosine_similarity(told, normal, dim=0)))
    share = 2 * q / (math.pi * 192)
    expected = math.sqrt(share / (1 + share) if alike else share)
    assert sum(cosines) / len(cosines) == pytest.approx(expected, abs=0.012)
