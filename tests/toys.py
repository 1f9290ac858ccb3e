"""Black boxes and attacks about which everything is known: what the engine's tests measure against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.errors import ModelError
from robustbox.protocol import (
    REJECTED,
    Answer,
    Attack,
    BlackBox,
    BudgetExhausted,
    Kind,
    Norm,
    Query,
    Scores,
    Search,
    Task,
)


class HalfSpace(BlackBox):
    """Class 1 where the mean over all values exceeds a threshold, else class 0; counts what it sees.

    The nearest adversarial of an image x below the threshold t is at l2 distance (t - mean(x)) sqrt(d), and at the linf
    distance t - mean(x). Answers each row by itself, in float64, so that no rounding depends on the batch.
    """

    name, classes, scores = "half-space", 2, "logit"

    def __init__(self, threshold: float = 0.6, classes: int = 2) -> None:
        self.threshold, self.classes = threshold, classes
        self.rows = 0
        self.passes: list[int] = []
        self.by_account: Counter[int] = Counter()
        self.seen: list[Tensor] = []

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.rows += len(rows)
        self.passes.append(len(rows))
        self.by_account.update(accounts.tolist())
        self.seen.append(rows.clone())
        return self.of(rows)

    def of(self, rows: Tensor) -> Answer:
        margin = torch.stack([row.double().mean() for row in rows]) - self.threshold
        logits = torch.stack([-margin, margin, *[torch.full_like(margin, -9)] * (self.classes - 2)], dim=1).float()
        return Answer.of((margin > 0).long(), logits)


class Gate(HalfSpace):
    """A half-space that refuses every k-th row, once it has answered the first `free` ones."""

    def __init__(self, k: int, free: int = 0) -> None:
        super().__init__()
        self.k, self.free = k, free

    def of(self, rows: Tensor) -> Answer:
        answer = super().of(rows)
        position = torch.arange(self.rows - len(rows), self.rows)
        refused = (position >= self.free) & (position % self.k == self.k - 1)
        labels = torch.where(refused, -1, answer.labels)
        return Answer(labels, answer.scores, refused.to(torch.uint8) * REJECTED)


class Failing(HalfSpace):
    """A half-space that does something wrong with its row number `after` and all that follow."""

    def __init__(self, after: int, wrong: Callable[[Answer], Answer], threshold: float = 0.6) -> None:
        super().__init__(threshold)
        self.after, self.wrong = after, wrong

    def of(self, rows: Tensor) -> Answer:
        answer = super().of(rows)
        return self.wrong(answer) if self.rows >= self.after else answer


@dataclass(frozen=True)
class Walk(Attack):
    """Asks the image brightened by random amounts, `size` rows a query; keeps a transcript of what it was told."""

    name: ClassVar[str] = "walk"
    norms: ClassVar[tuple[Norm, ...]] = ("l0", "l2", "linf")

    size: int = 3
    queries: int | None = None
    kind: Kind = "probe"
    transcript: dict[float, list[object]] = field(default_factory=dict)

    def search(self, task: Task) -> Search:
        told = self.transcript.setdefault(float(task.image.double().sum()), [])
        asked = 0
        while self.queries is None or asked < self.queries:
            step = torch.rand(self.size, 1, 1, 1, generator=task.generator, device=task.image.device)
            told.append(task.remaining)
            answer = yield Query((task.image + step).clamp(0, 1), self.kind)
            told.append((answer.labels.tolist(), answer.status.tolist()))
            asked += 1


@dataclass(frozen=True)
class Scripted(Attack):
    """Runs a generator function of the test."""

    script: Callable[[Task], Search]
    name: ClassVar[str] = "scripted"
    norms: ClassVar[tuple[Norm, ...]] = ("l0", "l2", "linf")

    def search(self, task: Task) -> Search:
        return self.script(task)


@dataclass(frozen=True)
class NeedsScores(Walk):
    """A walk that says that it cannot live without scores, and keeps those that it saw."""

    name: ClassVar[str] = "needs-scores"
    knowledge: ClassVar = "score"
    saw: list[Tensor | None] = field(default_factory=list)

    def search(self, task: Task) -> Search:
        answer = yield Query(task.image[None])
        self.saw.append(answer.scores)


def images(n: int, shape: tuple[int, int, int] = (3, 8, 8), mean: float = 0.4, seed: int = 0) -> Tensor:
    """n images around a mean value; a half-space at 0.6 puts them all into class 0."""
    noise = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return (mean + 0.2 * noise).clamp(0, 1)


def stubborn(task: Task) -> Search:
    """Goes on after its budget was exhausted."""
    while True:
        try:
            yield Query(task.image[None])
        except BudgetExhausted:
            yield Query(task.image[None])


__all__ = ["Failing", "Gate", "HalfSpace", "NeedsScores", "Scores", "Scripted", "Walk", "images", "stubborn"]


class Flaky(BlackBox):
    """Mixed in before a black box: fails in passes of these numbers, from 1 on, before it has answered anything."""

    def __init__(self, passes: Collection[int]) -> None:
        super().__init__()
        self.passes, self.asked = passes, 0

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.asked += 1
        if self.asked in self.passes:
            raise ModelError("planted")
        return super().answer(rows, accounts)
