"""Estimated gradients against what theory says of them: unbiased, of a known error, exact, blind at a saddle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustbox.defenses.zo_estimators import CGE, RGE, GradientEstimator, Loss, TwoPoint
from robustbox.errors import InputError

D = 64


def linear(g: Tensor) -> Loss:
    return lambda points: points.double() @ g.double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(loss: Loss, rows: list[int]) -> Loss:
    def value(points: Tensor) -> Tensor:
        rows.append(points.shape[1])
        return loss(points)

    return value


@pytest.mark.parametrize("q", [8, 40])
@pytest.mark.parametrize("kind", ["rge", "two-point"])
def test_random_directions_err_as_theory_says(kind: str, q: int) -> None:
    """E|e - g|^2 / |g|^2 = (d - 1) / q within 10 %, the mean is g, and the cosine is sqrt(q / (q + d - 1))."""
    g = torch.randn(D, generator=generator(1), dtype=torch.float64)
    z = torch.randn(4000, D, generator=generator(2), dtype=torch.float64)
    estimator: GradientEstimator = RGE(q=q) if kind == "rge" else TwoPoint(m=q, directions="sphere")
    e, flat = estimator.estimate(linear(g), z, generator(3))
    assert flat == 0
    assert ((e - g).square().sum(1).mean() / g.square().sum() * q / (D - 1)).item() == pytest.approx(1, abs=0.1)
    assert (e.mean(0) - g).norm() / g.norm() < 4 * math.sqrt(D / q / len(z))
    cosine = torch.cosine_similarity(e, g[None]).mean().item()
    assert cosine == pytest.approx(math.sqrt(q / (q + D - 1)), abs=0.03)


def test_gaussian_pairs_are_unbiased() -> None:
    g = torch.randn(D, generator=generator(1), dtype=torch.float64)
    e, _ = TwoPoint(m=40, directions="gauss").estimate(
        linear(g), torch.zeros(4000, D, dtype=torch.float64), generator()
    )
    assert (e.mean(0) - g).norm() / g.norm() < 4 * math.sqrt((D + 1) / 40 / 4000)


def test_central_coordinates_are_exact_on_a_quadratic_and_forward_ones_are_not() -> None:
    A = torch.randn(D, D, generator=generator(4), dtype=torch.float64)
    z = torch.randn(5, D, generator=generator(5), dtype=torch.float64)

    def loss(points: Tensor) -> Tensor:
        return (points @ A).square().sum(-1) / 2

    truth = z @ A @ A.T
    exact, _ = CGE(central=True).estimate(loss, z, generator())
    assert (exact - truth).abs().max() < 1e-9
    forward, _ = CGE(central=False).estimate(loss, z, generator())
    assert torch.allclose(forward - truth, (0.005 / 2 * (A @ A.T).diagonal()).expand(5, D), atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 7])
def test_rows_are_those_that_the_estimators_state(chunk: int | None) -> None:
    estimators = {
        RGE(q=20, chunk=chunk): 21,
        CGE(chunk=chunk): 2 * D,
        CGE(chunk=chunk, central=False): D + 1,
        TwoPoint(m=20, chunk=chunk): 40,
    }
    for estimator, rows in estimators.items():
        asked: list[int] = []
        estimator.estimate(counted(linear(torch.ones(D)), asked), torch.zeros(3, D), generator())
        assert sum(asked) == estimator.rows(D) == rows
        assert max(asked) <= (chunk or D)


def test_an_estimate_knows_no_neighbours() -> None:
    """Permuted samples give permuted estimates; a sample alone has that of one among others, where nothing is drawn."""
    g = torch.randn(6, D, generator=generator(6))

    def loss(points: Tensor) -> Tensor:
        return (points * points).double().sum(-1).sin()

    whole, _ = CGE().estimate(loss, g, generator())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(CGE().estimate(loss, g[order], generator())[0], whole[order])
    assert torch.equal(CGE().estimate(loss, g[2:3], generator())[0], whole[2:3])
    noise = RGE(q=4)
    a, _ = noise.estimate(loss, g, generator(8))
    other = g.clone()
    other[1:] += 1  # the neighbours change, the directions do not
    assert torch.equal(noise.estimate(loss, other, generator(8))[0][0], a[0])


def test_a_kick_leaves_the_saddle_and_nothing_else_does() -> None:
    """The loss is x1^2 - x2^2 + x2^4 / 4: even around 0, its minima at x2 = +-sqrt 2."""

    def loss(points: Tensor) -> Tensor:
        return points[..., 0] ** 2 - points[..., 1] ** 2 + points[..., 1] ** 4 / 4

    for kick, leaves in ((0.0, False), (0.05, True)):
        z, noise = torch.zeros(8, 2, dtype=torch.float64), generator(9)
        for _ in range(300):
            z = z - 0.05 * TwoPoint(m=1, kick=kick).estimate(loss, z, noise)[0]
        moved = bool((z[:, 1].abs() - math.sqrt(2)).abs().max() < 0.1)
        assert moved == leaves
        assert leaves or torch.equal(z, torch.zeros_like(z))


def test_rounded_scores_show_as_zero_differences() -> None:
    _, flat = RGE(q=50).estimate(
        lambda points: points.double().sum(-1).round(decimals=1), torch.zeros(4, D), generator()
    )
    assert flat > 0.2


@pytest.mark.parametrize("bad", [{"mu": 0.0}, {"chunk": 0}])
def test_bad_numbers(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        RGE(**bad)  # type: ignore[arg-type]
