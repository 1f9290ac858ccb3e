"""Differential evolution (Storn and Price: Differential Evolution, J. of Global Optimization 11, 1997) as ask and tell.

A population of n individuals x_i in the unit cube of d genes. Each generation makes n children at once and lets child i
compete with father i alone:

    mutant_i = x_a + F (x_b - x_c)        a, b, c: three others, all different from each other and from i   (rand1)
    mutant_i = x_best + F (x_b - x_c)     best: the least loss so far                                       (best1)
    child_i  = repair(mutant_i), but each gene is the father's with probability 1 - CR, never all of them
    x_i     <- child_i if loss(child_i) <= loss(x_i)

The core asks nothing itself. `ask` returns rows to be judged, `tell` takes their losses, so an attack decides how they are
painted, in how many queries they are sent, and when to stop:

    evolution = Evolution(population, clip, generator)
    while True:
        evolution.tell(yield from losses_of(evolution.ask()))

A generation is a handful of tensor operations on [n,d] on the population's device, without a host sync.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Base = Literal["rand", "best"]
Repair = Callable[[Tensor], Tensor]
"""Brings mutants [n,d] back into the unit cube."""


class Evolution:
    """A population that is asked for individuals and told their losses.

    The first `ask` returns the initial population itself, every later one n children.

    Args:
        population: float [n,d] in the unit cube; n at least 4 for rand1, 3 for best1.
        repair: brings mutants back into the unit cube.
        generator: source of all randomness, on the population's device.
        base: what mutants start from: a random individual (rand1) or the best (best1).
        weight: F, or a range (low, high) from which one F a generation is drawn (dither).
        crossover: CR, the probability that a gene comes from the mutant; 1: the child is the mutant.

    Attributes:
        population: the fathers, [n,d].
        losses: theirs, [n]; inf before the first `tell`. They never rise.

    Raises:
        ValueError: too few individuals for the mutants to have distinct parents.
    """

    def __init__(
        self,
        population: Tensor,
        repair: Repair,
        generator: torch.Generator,
        base: Base = "rand",
        weight: float | tuple[float, float] = 0.5,
        crossover: float = 1.0,
    ) -> None:
        least = smallest_population(base)
        if len(population) < least:
            raise ValueError(f"{base}1 needs a population of at least {least}, got {len(population)}")
        self.population = population
        self.losses = torch.full((len(population),), torch.inf, device=population.device)
        self._repair, self._generator = repair, generator
        self._base, self._weight, self._crossover = base, weight, crossover
        self._asked = population
        self._born = False

    def ask(self) -> Tensor:
        """The individuals to be judged next, [n,d]."""
        if self._born:
            self._asked = self._crossed(self._repair(self._mutants()))
        self._born = True
        return self._asked

    def tell(self, losses: Tensor) -> None:
        """The losses [n] of the individuals that were asked last: each is compared with its own father alone.

        A child as good as its father replaces it, so that the population drifts over plateaus instead of freezing on
        them. Give inf where nothing is known.
        """
        better = losses <= self.losses
        self.population = torch.where(better[:, None], self._asked, self.population)
        self.losses = torch.where(better, losses, self.losses)

    def _mutants(self) -> Tensor:
        x, n = self.population, len(self.population)
        weight: float | Tensor
        if isinstance(self._weight, tuple):
            low, high = self._weight
            weight = low + (high - low) * torch.rand((), generator=self._generator, device=x.device)
        else:
            weight = self._weight
        if self._base == "best":
            b, c = distinct_others(n, 2, self._generator)
            best = x.index_select(0, self.losses.argmin()[None])  # an index would wait for the device
            return best + weight * (x[b] - x[c])
        a, b, c = distinct_others(n, 3, self._generator)
        return x[a] + weight * (x[b] - x[c])

    def _crossed(self, mutants: Tensor) -> Tensor:
        """Binomial crossover with the fathers; at least one gene is the mutant's."""
        if self._crossover >= 1:
            return mutants
        n, d = mutants.shape
        drawn = torch.rand(n, d, generator=self._generator, device=mutants.device) < self._crossover
        sure = torch.randint(d, (n, 1), generator=self._generator, device=mutants.device)
        return torch.where(drawn.scatter_(1, sure, True), mutants, self.population)


def latin_hypercube(n: int, d: int, generator: torch.Generator) -> Tensor:
    """n points in the unit cube, [n,d]: along each axis one in every n-th of it."""
    cells = torch.rand(n, d, generator=generator, device=generator.device).argsort(dim=0)
    return (cells + torch.rand(n, d, generator=generator, device=generator.device)) / n


def smallest_population(base: Base) -> int:
    """How many individuals a mutant's distinct parents and its father take."""
    return 3 if base == "best" else 4


def distinct_others(n: int, count: int, generator: torch.Generator) -> Tensor:
    """For every i < n, `count` indices that differ from i and from each other, uniformly: int64 [count,n].

    No rejection, O(n count^2): index j is drawn among the n - 1 - j numbers that remain, and skips those taken before it.
    """
    taken = torch.arange(n, device=generator.device)[None]
    for j in range(count):
        index = torch.randint(n - 1 - j, (n,), generator=generator, device=generator.device)
        for smaller in taken.sort(dim=0).values:
            index = index + (index >= smaller)
        taken = torch.cat([taken, index[None]])
    return taken[1:]


def clip(genes: Tensor) -> Tensor:
    """Repair by the nearest point of the unit cube: many genes end exactly on its faces."""
    return genes.clamp(0, 1)


def reflect(genes: Tensor) -> Tensor:
    """Repair by mirrors at 0 and 1."""
    return 1 - (genes.remainder(2) - 1).abs()


def redraw(generator: torch.Generator) -> Repair:
    """Repair by a fresh uniform value for every gene outside the unit cube (scipy's way)."""

    def repair(genes: Tensor) -> Tensor:
        fresh = torch.rand(genes.shape, generator=generator, device=genes.device)
        return torch.where((genes < 0) | (genes > 1), fresh, genes)

    return repair
