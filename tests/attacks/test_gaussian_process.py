"""The process is botorch's to the last digits, its bits are Bayes' rule, and its searches beat chance."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F

from robustbox.attacks.gaussian_process import LENGTHSCALES, Process, acquisition, maximise

ACQUISITIONS = ("ei", "poi", "pm", "ucb")


def directions(n: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)


def told(points: Tensor, values: Tensor, **prior: float) -> Process:
    process = Process(points.shape[1], **prior)
    for point, value in zip(points, values.tolist(), strict=True):
        process.tell(point, value)
    return process


def normalise(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def test_the_posterior_is_that_of_botorch() -> None:
    from botorch.models import SingleTaskGP
    from gpytorch.kernels import RBFKernel, ScaleKernel

    points, new = directions(20, 7), directions(9, 7, seed=1)
    values = (3 * points[:, 0] - points[:, 1] ** 2).add(0.3)
    noises = torch.linspace(0.01, 0.2, 20, dtype=torch.float64)
    process = Process(7, lengthscale=0.8, variance=1.7, mean=0.4)
    for point, value, noise in zip(points, values.tolist(), noises.tolist(), strict=True):
        process.tell(point, value, noise)

    kernel = ScaleKernel(RBFKernel())
    theirs = SingleTaskGP(points, values[:, None], noises[:, None], covar_module=kernel, outcome_transform=None)
    kernel.outputscale, kernel.base_kernel.lengthscale = 1.7, 0.8
    theirs.mean_module.constant.data.fill_(0.4)
    theirs.eval()
    with torch.no_grad():
        expected = theirs.posterior(new)
        mean, variance = process.moments(new)
    torch.testing.assert_close(mean, expected.mean[:, 0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(variance, expected.variance[:, 0], atol=1e-6, rtol=1e-6)


def test_observations_without_noise_are_interpolated() -> None:
    points = directions(30, 6)
    values = torch.sin(3 * points[:, 0]) + points[:, 1]
    mean, variance = told(points, values, noise=0.0).moments(points)
    torch.testing.assert_close(mean, values, atol=1e-4, rtol=0)
    assert variance.max() < 1e-5


def test_one_by_one_and_forgetting_agree_with_starting_over() -> None:
    points, new = directions(25, 5), directions(4, 5, seed=1)
    values = points @ torch.arange(5.0, dtype=torch.float64)
    process = told(points, values)
    process.forget(10)
    afresh = told(points[10:], values[10:])
    assert len(process) == 15
    for mine, theirs in zip(process.moments(new), afresh.moments(new), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_the_fit_is_at_least_as_likely_as_botorch_s() -> None:
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.kernels import RBFKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood

    points = directions(40, 10)
    values = 5 + points @ torch.arange(10.0, dtype=torch.float64) + 3 * points[:, 0] ** 2

    def likelihood(lengthscale: float, variance: float, noise: float, mean: float) -> float:
        prior = Process(10, lengthscale, variance, noise, mean)
        covariance = prior.kernel(points, points) + noise * torch.eye(40, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(values.new_full((40,), mean), covariance)
        return float(normal.log_prob(values))

    process = told(points, values)
    process.fit()
    kernel = ScaleKernel(RBFKernel())
    theirs = SingleTaskGP(points, values[:, None], covar_module=kernel)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(theirs.likelihood, theirs))
    scale, shift = float(values.std()), float(values.mean())
    best = likelihood(
        float(kernel.base_kernel.lengthscale.detach()),
        float(kernel.outputscale.detach()) * scale**2,
        float(theirs.likelihood.noise.detach()) * scale**2,
        float(theirs.mean_module.constant.detach()) * scale + shift,
    )
    assert likelihood(process.lengthscale, process.variance, process.noise, process.mean) > best - 1
    assert process.lengthscale > LENGTHSCALES[3]  # nearly linear


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_equal_observations_neither_inform_the_fit_nor_make_a_nan(name: str) -> None:
    points, starts = directions(12, 5), directions(50, 5, seed=1)
    process = told(points, torch.full((12,), -1.0), mean=-1.0)
    before = process.lengthscale, process.variance, process.noise, process.mean
    process.fit()
    assert (process.lengthscale, process.variance, process.noise, process.mean) == before
    mean, variance = process.moments(starts)
    torch.testing.assert_close(mean, torch.full_like(mean, -1), atol=1e-12, rtol=0)
    function = acquisition(name, process, -1.0, 1.0)
    assert function(starts[:, None]).isfinite().all()
    assert maximise(function, starts, process.points, normalise).isfinite().all()
    if name == "ei":  # the paper's objective: expected improvement is s / sqrt(2 pi), the answers' share is none
        expected = variance.sqrt() / math.sqrt(2 * math.pi)
        torch.testing.assert_close(function(starts[:, None]).exp(), expected, atol=1e-9, rtol=1e-6)


def test_expected_improvement_is_the_integral() -> None:
    points, new = directions(8, 4), directions(5, 4, seed=1)
    process = told(points, points[:, 0])
    best = float(points[:, 0].max())
    found = acquisition("ei", process, best, 1.0)(new[:, None]).exp()
    for value, mean, variance in zip(found.tolist(), *(m.tolist() for m in process.moments(new)), strict=True):
        density = norm(mean, math.sqrt(variance)).pdf
        expected, _ = quad(lambda f, p=density: (f - best) * p(f), best, mean + 20 * math.sqrt(variance))
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.2])
def test_a_bit_moves_the_moments_as_bayes_rule_does(above: bool, threshold: float) -> None:
    process = Process(1, variance=0.8, noise=0.1, mean=0.2)
    origin = torch.zeros(1, dtype=torch.float64)
    process.tell_side(origin, threshold, above)
    sign = 1 if above else -1

    def posterior(f: float) -> float:
        return float(norm(0.2, math.sqrt(0.8)).pdf(f) * norm.cdf(sign * (f - threshold) / math.sqrt(0.1)))

    mass, first, second = (quad(lambda f, k=k: f**k * posterior(f), -8, 8, points=[threshold])[0] for k in range(3))
    mean, variance = process.moments(origin[None])
    assert float(mean) == pytest.approx(first / mass, abs=1e-5)
    assert float(variance) == pytest.approx(second / mass - (first / mass) ** 2, abs=1e-5)


def test_surprising_and_expected_bits_stay_finite() -> None:
    process = Process(2, variance=1.0, noise=1e-6)
    point = torch.tensor([1.0, 0.0], dtype=torch.float64)
    process.tell_side(point, -60.0, True)
    assert len(process) == 0  # a matter of course
    process.tell_side(point, 40.0, True)
    mean, variance = process.moments(point[None])
    assert float(mean) == pytest.approx(40, abs=0.1)
    assert 0 < float(variance) < 0.01


def test_thirty_points_of_expected_improvement_beat_thirty_at_random() -> None:
    def value(point: Tensor) -> float:
        """Highest, 1, at the first axis; with a lower hill at the opposite side."""
        return float(torch.exp(4 * (point[0] - 1)) + 0.3 * torch.exp(4 * (-point[0] - 1)))

    wins = 0
    for seed in range(20):
        dim = 3 + seed % 4
        blind = directions(30, dim, seed)
        process = told(blind[:5], torch.tensor([value(point) for point in blind[:5]], dtype=torch.float64))
        for step in range(25):
            if step % 8 == 0:
                process.fit()
            starts = torch.cat([directions(60, dim, 1000 * seed + step), process.points])
            function = acquisition("ei", process, float(process.values.max()), 1.0)
            point = maximise(function, starts, process.points, normalise)
            process.tell(point, value(point))
        wins += float(process.values.max()) > max(value(point) for point in blind)
    assert wins >= 18


def test_climbing_ends_at_the_maximum_and_admits_only_what_it_may() -> None:
    slope = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    process = told(directions(40, 4), directions(40, 4) @ slope, lengthscale=3.0)
    function = acquisition("pm", process, 0.0, 1.0)
    found = maximise(function, directions(100, 4, seed=2), process.points, normalise, rounds=12)
    assert float(found @ normalise(slope)) > 0.99

    def corners(vectors: Tensor) -> Tensor:
        return F.normalize(torch.where(vectors < 0, -1.0, 1.0).double(), dim=-1)

    found = maximise(function, corners(directions(4, 4, seed=3)), process.points, corners)
    assert found.abs().tolist() == [0.5] * 4


def test_the_means_at_the_points_observed_are_the_posterior_s() -> None:
    points = directions(20, 6)
    process = told(points, 2 + points[:, 0], noise=0.3, mean=1.5)
    process.tell_side(points[3], 2.5, True)
    torch.testing.assert_close(process.means, process.moments(process.points)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_the_best_known_direction_is_climbed_from_but_never_returned(name: str) -> None:
    points = directions(12, 5)
    process = told(points, points[:, 0])
    top = points[points[:, 0].argmax()]
    function = acquisition(name, process, float(top[0]), 1.0)
    starts = torch.cat([top[None], -directions(3, 5, seed=1).abs()])
    found = maximise(function, starts, points, normalise)
    assert float((points @ found).max()) < 1 - 1e-6
    if name == "pm":
        assert found[0] > top[0]  # from the known one: all other starts lie on the far side
    again = maximise(function, points, points, lambda vectors: points[0].expand_as(vectors))
    assert (points == again).all(1).any()  # nothing fresh is left


def test_what_is_near_to_what_was_asked_is_left_out_where_there_is_room() -> None:
    points = directions(12, 5)
    process = told(points, points[:, 0])
    function = acquisition("pm", process, 0.0, 1.0)
    starts = torch.cat([points, directions(60, 5, seed=1)])
    near, far = (maximise(function, starts, points, normalise, room=room) for room in (1e-6, 0.3))
    assert 0.8 < float((points @ near).max()) < 1 - 1e-6
    assert float((points @ far).max()) < 0.7
    assert far[0] > points[:, 0].median()

    turns = torch.linspace(0, 2 * math.pi, 17, dtype=torch.float64)[:-1]
    circle = torch.stack([turns.cos(), turns.sin()], dim=1)  # every direction is within 12 degrees of one of them
    process = told(circle, circle[:, 0])
    function = acquisition("pm", process, 0.0, 1.0)
    found = maximise(function, torch.cat([circle, directions(9, 2)]), circle, normalise, room=0.1)
    assert float((circle @ found).max()) < 1 - 1e-6
    assert found[0] > 0.9
