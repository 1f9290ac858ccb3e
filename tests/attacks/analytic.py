"""Models whose nearest adversarial is known in closed form, and a driver for a single search."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustbox.protocol import REJECTED, Answer, Norm, Query, Task

T = TypeVar("T")
Labels = Callable[[Tensor], Tensor]


def unit(shape: tuple[int, ...], seed: int) -> Tensor:
    """A random direction of length 1, float32."""
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (direction / direction.norm()).float()


@dataclass(eq=False)
class Flat:
    """Class 1 beyond a plane that passes at distance `distance` from grey images [n,C,H,W]; counts rows, checks the box.

    The images differ along the plane only, so that each of them is at exactly that distance, with a stream of its own.
    """

    shape: tuple[int, int, int]
    distance: float
    levels: int | None = None
    rows: int = 0
    normal: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.normal = unit(self.shape, seed=1)

    def images(self, n: int) -> Tensor:
        along = torch.stack([unit(self.shape, seed=2 + i) for i in range(n)])
        along -= (along * self.normal).sum(dim=(1, 2, 3), keepdim=True) * self.normal
        return 0.5 + 0.1 * along

    def __call__(self, rows: Tensor) -> Tensor:
        check_box(rows)
        self.rows += len(rows)
        if self.levels:
            rows = (rows * (self.levels - 1)).round() / (self.levels - 1)
        return ((rows - 0.5).double().flatten(1) @ self.normal.double().flatten() > self.distance).long()


def check_box(rows: Tensor) -> None:
    assert torch.isfinite(rows).all()
    assert rows.min() >= 0
    assert rows.max() <= 1


def task(image: Tensor, norm: Norm = "l2", seed: int = 0, budget: int = 1000, **fields: Any) -> Task:
    settings: dict[str, Any] = {"label": 0, "target": None, "epsilon": None} | fields
    return Task(image, norm=norm, generator=torch.Generator().manual_seed(seed), remaining=budget, **settings)


def drive(
    search: Generator[Query, Answer, T], of: Task, answers: Callable[[Tensor], Answer | Tensor]
) -> tuple[T | None, list[Query]]:
    """Runs a search until it returns or asks beyond its budget: what it returned (None if cut), and its queries."""
    asked: list[Query] = []
    answer: Answer | None = None
    try:
        while True:
            query = next(search) if answer is None else search.send(answer)
            check_box(query.rows)
            if len(query.rows) > of.remaining:
                return None, asked
            asked.append(query)
            of.remaining -= len(query.rows)
            given = answers(query.rows)
            answer = given if isinstance(given, Answer) else Answer.of(given)
    except StopIteration as done:
        return done.value, asked


def refusing(labels: Labels, which: Callable[[int], bool], garbage: int = -1) -> Callable[[Tensor], Answer]:
    """A black box behind a gate that refuses rows by their number, counted from 0."""
    seen = 0

    def answers(rows: Tensor) -> Answer:
        nonlocal seen
        refused = torch.tensor([which(seen + k) for k in range(len(rows))])
        seen += len(rows)
        return Answer(torch.where(refused, garbage, labels(rows)), None, refused.to(torch.uint8) * REJECTED)

    return answers
