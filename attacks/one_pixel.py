"""The one-pixel attack (Su, Vargas, Sakurai: One Pixel Attack for Fooling Deep Neural Networks, IEEE TEVC 2019).

Differential evolution (`evolution.Evolution`) over k pixels: an individual holds k times row, column and colour, and its loss
is the probability of the true class, or one minus that of the target. Two presets:

              paper                                       best1
    mutants   rand1, F = 0.5                              best1, F drawn from U[0.5, 1) each generation
    start     places uniform, colours N(128, 127)         all genes by a Latin hypercube
    repair    places reflected, colours clipped           redrawn uniformly
    size      400, 100 generations                        400, 75 generations

`paper` is the article's; `best1` is what its widespread implementations do, which descend from scipy's solver. Neither
crosses genes over: the child is the mutant.

Query cost: P (g + 1) rows after g generations with a population of P; at most P (G + 1), 40,400 with the paper's numbers.
It ends with the query that holds the first success: a population is one query, unless its rows exceed `moves.ROW_BYTES`.

Deviations from the paper:

- Success is the label, checked on every row. The article stops at a confidence (p_target > 90 %, p_true < 5 %), its
  implementations check the best individual alone, and pass over rows that another class wins at a higher p_true.
- Exactly k pixels change: a place taken twice moves on to the next pixel, a colour equal to the image's changes by a level.
- "Untargeted" is one search that leaves the class. The article reads its CIFAR-10 rate off nine targeted searches an image.
- The parents of a mutant also differ from its father. Ties are won by the child.
- `loss=margin` compares log-probabilities, which still tell candidates apart where p_true rounds to 1.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from robustbox.errors import InputError, unknown_name
from robustbox.protocol import Answer, Attack, Norm, Query, Search, Task

from .evolution import Evolution, clip, latin_hypercube, redraw, reflect, smallest_population
from .losses import Loss, check_loss, losses
from .pixels import check_pixels, decode, paint, pixels_of, rows_a_query

Preset = Literal["paper", "best1"]


@dataclass(frozen=True)
class OnePixel(Attack):
    """One pixel, or k, by differential evolution on scores (Su et al. 2019).

    Args:
        pixels: how many pixels to change, exactly; default: as many as epsilon allows, or 1.
        preset: paper (rand1, F 0.5, normal start) or best1 (best1, dithered F, Latin hypercube start).
        population: individuals P; a generation costs as many rows.
        generations: generations after the first population; default: 100 for paper, 75 for best1.
        loss: probability (of the true or target class, as in the paper), cross-entropy (its logarithm) or margin (difference
            of log-probabilities to the best other class).
    """

    name: ClassVar[str] = "one-pixel"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    pixels: int | None = None
    preset: Preset = "paper"
    population: int = 400
    generations: int | None = None
    loss: Loss = "probability"

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        check_loss(self.loss)
        if self.preset not in get_args(Preset):
            raise unknown_name("preset", self.preset, get_args(Preset))
        least = smallest_population("best" if self.preset == "best1" else "rand")
        if self.population < least:
            raise InputError(f"population must be at least {least} for preset {self.preset}, got {self.population}")
        if self.generations is not None and self.generations < 0:
            raise InputError(f"generations must be at least 0, got {self.generations}")

    def check(self, task: Task) -> None:
        pixels_of(task, self.pixels)

    def search(self, task: Task) -> Search:
        k = pixels_of(task, self.pixels)
        evolution = self._start(task, k)
        default = 100 if self.preset == "paper" else 75
        for _ in range(1 + (default if self.generations is None else self.generations)):
            genes = evolution.ask().view(self.population, k, -1)
            judged = yield from self._judge(task, *decode(task, genes))
            if judged is None:
                return
            evolution.tell(judged)

    def _start(self, task: Task, k: int) -> Evolution:
        n, genes, generator = self.population, 2 + len(task.image), task.generator
        if self.preset == "best1":
            start = latin_hypercube(n, k * genes, generator)
            return Evolution(start, redraw(generator), generator, "best", weight=(0.5, 1.0))
        start = torch.rand(n, k, genes, generator=generator, device=generator.device)
        start[..., 2:].normal_(128 / 256, 127 / 256, generator=generator).clamp_(0, 1)

        def repair(mutants: Tensor) -> Tensor:
            places, colours = mutants.view(n, k, genes).split([2, genes - 2], dim=2)
            return torch.cat([reflect(places), clip(colours)], dim=2).flatten(1)

        return Evolution(start.flatten(1), repair, generator)

    def _judge(self, task: Task, positions: Tensor, colours: Tensor) -> Generator[Query, Answer, Tensor | None]:
        """The losses of candidates [n], or None once a row reached the goal. Cost: n rows."""
        size = rows_a_query(task)
        known = []
        for some, theirs in zip(positions.split(size), colours.split(size), strict=True):
            answer = yield Query(paint(task, some, theirs))  # the rows live no longer than their query
            if task.settled(answer):
                return None
            known.append(losses(task, answer, self.loss))
        return torch.cat(known)
