"""The differential evolution core: the algebra of its formulas, and scipy's solver as the oracle of what it finds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import differential_evolution
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch._subclasses import FakeTensorMode

from robustbox.attacks.evolution import (
    Base,
    Evolution,
    clip,
    distinct_others,
    latin_hypercube,
    redraw,
    reflect,
    smallest_population,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.rand(n, d, generator=generator(seed))


def keep(genes: Tensor) -> Tensor:
    return genes


# The formulas.


def test_the_first_individuals_are_the_population_itself() -> None:
    start = uniform(7, 3)
    evolution = Evolution(start.clone(), clip, generator())
    assert evolution.ask().equal(start)
    assert evolution.losses.isinf().all()
    evolution.tell(torch.arange(7.0))
    assert evolution.population.equal(start)
    assert evolution.losses.equal(torch.arange(7.0))


def test_rand1_children_are_the_formula() -> None:
    evolution = Evolution(uniform(50, 4), keep, generator(3), weight=0.7)
    evolution.tell(evolution.ask().sum(dim=1))
    a, b, c = distinct_others(50, 3, generator(3))
    x = evolution.population
    assert torch.allclose(evolution.ask(), x[a] + 0.7 * (x[b] - x[c]), atol=1e-6)


def test_best1_children_are_the_formula_with_one_drawn_weight_a_generation() -> None:
    evolution = Evolution(uniform(50, 4), keep, generator(3), base="best", weight=(0.5, 1.0))
    evolution.tell(evolution.ask().sum(dim=1))
    twin = generator(3)
    weight = 0.5 + 0.5 * torch.rand((), generator=twin)
    b, c = distinct_others(50, 2, twin)
    x, best = evolution.population, evolution.losses.argmin()
    assert 0.5 <= weight < 1
    assert torch.allclose(evolution.ask(), x[best] + weight * (x[b] - x[c]), atol=1e-6)


@pytest.mark.parametrize("base", ["rand", "best"])
def test_a_generation_reads_nothing_from_its_device(base: Base) -> None:
    """Tensors without values raise where one is asked for."""
    with FakeTensorMode():
        evolution = Evolution(uniform(8, 5), clip, generator(), base, weight=(0.5, 1.0), crossover=0.7)
        for _ in range(3):
            evolution.tell(evolution.ask().sum(dim=1))


def test_crossover_takes_the_stated_share_of_genes_and_never_none() -> None:
    start = uniform(4000, 5)
    evolution = Evolution(start, lambda genes: genes + 100, generator(), crossover=0.3)
    evolution.tell(torch.zeros(4000))
    evolution.ask()
    mutant = evolution.ask() > 50
    assert mutant.any(dim=1).all()
    expected = 0.3 + 0.7 / 5  # one gene in five is the mutant's for sure
    assert mutant.float().mean() == pytest.approx(expected, abs=0.01)
    assert evolution.ask()[~mutant].lt(50).any()


@pytest.mark.parametrize("base", ["rand", "best"])
def test_a_child_competes_with_its_own_father_alone_and_losses_never_rise(base: Base) -> None:
    evolution = Evolution(uniform(30, 3), reflect, generator(), base=base)
    noise = generator(9)
    for _ in range(40):
        asked, fathers, before = evolution.ask(), evolution.population, evolution.losses
        judged = torch.rand(30, generator=noise)
        evolution.tell(judged)
        won = judged <= before
        assert evolution.population.shape == (30, 3)
        assert evolution.population[won].equal(asked[won])
        assert evolution.population[~won].equal(fathers[~won])
        assert evolution.losses.equal(torch.minimum(judged, before))


def test_an_unknown_loss_replaces_nobody() -> None:
    evolution = Evolution(uniform(6, 2), clip, generator())
    evolution.tell(evolution.ask().sum(dim=1))
    fathers = evolution.population
    evolution.ask()
    evolution.tell(torch.full((6,), torch.inf))
    assert evolution.population.equal(fathers)


def test_parents_and_father_are_distinct_over_100000_draws() -> None:
    stream = generator()
    for n in [4, 5, 7, *[2500] * 40]:
        everyone = torch.cat([torch.arange(n)[None], distinct_others(n, 3, stream)]).sort(dim=0).values
        assert everyone.diff(dim=0).min() > 0
        assert everyone.min() >= 0
        assert everyone.max() < n


def test_parents_are_uniform_over_the_others() -> None:
    stream, n, calls = generator(), 6, 1000
    counts = torch.zeros(3, n, n)
    for _ in range(calls):
        counts[torch.arange(3)[:, None], torch.arange(n), distinct_others(n, 3, stream)] += 1
    expected = (1 - torch.eye(n)) / (n - 1)
    assert (counts / calls - expected).abs().max() < 5 * (0.2 * 0.8 / calls) ** 0.5


@pytest.mark.parametrize("base", ["rand", "best"])
def test_the_smallest_population_works_and_a_smaller_one_is_refused(base: Base) -> None:
    least = smallest_population(base)
    evolution = Evolution(uniform(least, 2), clip, generator(), base=base)
    for _ in range(5):
        evolution.tell(evolution.ask().sum(dim=1))
    with pytest.raises(ValueError, match=f"at least {least}"):
        Evolution(uniform(least - 1, 2), clip, generator(), base=base)


def test_repairs() -> None:
    genes = torch.tensor([[-2.25, -0.25, 0.0, 0.25, 1.0, 1.25, 3.5]])
    assert clip(genes).tolist() == [[0, 0, 0, 0.25, 1, 1, 1]]
    assert reflect(genes).tolist() == [[0.25, 0.25, 0, 0.25, 1, 0.75, 0.5]]
    redrawn = redraw(generator())(genes)
    assert redrawn[0, 2:5].tolist() == [0, 0.25, 1]
    assert ((redrawn >= 0) & (redrawn <= 1)).all()
    assert redrawn[0, [0, 1, 5, 6]].unique().numel() == 4


def test_latin_hypercube_has_one_point_in_every_slice() -> None:
    points = latin_hypercube(40, 6, generator())
    slices = (points * 40).floor().long()
    assert slices.sort(dim=0).values.equal(torch.arange(40)[:, None].expand(40, 6))
    assert (slices[:, 0] != slices[:, 1]).any()


def test_the_generator_is_the_only_source_of_randomness() -> None:
    def final(seed: int) -> Tensor:
        evolution = Evolution(uniform(20, 3), redraw(stream := generator(seed)), stream, "best", (0.5, 1.0), 0.9)
        for _ in range(10):
            evolution.tell(evolution.ask().square().sum(dim=1))
        return evolution.population

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert final(5).equal(final(5))
    assert not final(5).equal(final(6))
    assert torch.get_rng_state().equal(before)


# scipy as the oracle: the same solver, told to do the same, must get as far.


def sphere(x: Tensor) -> Tensor:
    return (x - 0.3).square().sum(dim=-1)


def rosenbrock(x: Tensor) -> Tensor:
    z = 4 * x - 2
    return (100 * (z[..., 1:] - z[..., :-1] ** 2) ** 2 + (1 - z[..., :-1]) ** 2).sum(dim=-1)


def rastrigin(x: Tensor) -> Tensor:
    z = 10 * x - 4
    return (z**2 - 10 * torch.cos(2 * torch.pi * z) + 10).sum(dim=-1)


SEEDS, SIZE, DIMENSIONS = 12, 30, 3
SETTINGS: dict[str, tuple[Base, float | tuple[float, float], float]] = {
    "rand1bin": ("rand", 0.5, 0.9),
    "best1bin": ("best", (0.5, 1.0), 0.7),
}


def ours(function: Callable[[Tensor], Tensor], strategy: str, generations: int, seed: int) -> float:
    base, weight, crossover = SETTINGS[strategy]
    stream = generator(seed)
    start = torch.rand(SIZE, DIMENSIONS, generator=stream, dtype=torch.float64)
    evolution = Evolution(start, redraw(stream), stream, base, weight, crossover)
    for _ in range(generations + 1):
        evolution.tell(function(evolution.ask()))
    return float(evolution.losses.min())


def scipys(function: Callable[[Tensor], Tensor], strategy: str, generations: int, seed: int) -> float:
    _, weight, crossover = SETTINGS[strategy]
    start = torch.rand(SIZE, DIMENSIONS, generator=generator(seed), dtype=torch.float64).numpy()
    solved = differential_evolution(
        lambda x: function(torch.from_numpy(np.ascontiguousarray(x.T))).numpy(),
        [(0, 1)] * DIMENSIONS,
        strategy=strategy,
        maxiter=generations,
        init=start,
        tol=0,
        atol=-1,
        mutation=weight,
        recombination=crossover,
        polish=False,
        vectorized=True,
        updating="deferred",
        seed=seed,
    )
    assert solved.nit == generations
    return float(solved.fun)


@pytest.mark.parametrize("strategy", list(SETTINGS))
@pytest.mark.parametrize(
    ("function", "generations", "solved"), [(sphere, 40, 1e-4), (rosenbrock, 80, 1e-2), (rastrigin, 60, 0.5)]
)
def test_gets_as_far_as_scipy(
    function: Callable[[Tensor], Tensor], generations: int, solved: float, strategy: str
) -> None:
    mine = [ours(function, strategy, generations, seed) for seed in range(SEEDS)]
    theirs = [scipys(function, strategy, generations, seed) for seed in range(SEEDS)]
    assert abs(sum(v < solved for v in mine) - sum(v < solved for v in theirs)) <= 4
    assert mannwhitneyu(mine, theirs).pvalue > 1e-3
    if function is sphere:  # one basin: the rate of convergence is the same too
        assert abs(np.median(np.log10(mine)) - np.median(np.log10(theirs))) < 1
