"""Gates about which everything is known, in front of a plane, and an attack that shows what it was told."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.protocol import ANSWERED, BANNED, REJECTED, Answer, Attack, Knob, Norm, Query, Search, Task
from tests.attacks.analytic import unit
from tests.attacks.table import Plane


class History:
    """Earlier rows, for their distances l2."""

    def __init__(self) -> None:
        self._table, self._rows = torch.empty(0, 0), 0

    def nearest(self, row: Tensor) -> float:
        """The distance of a row [C,H,W] to the nearest earlier one, inf without any; remembers it."""
        if self._rows == len(self._table):
            room = torch.empty(self._rows + 64, row.numel())
            self._table = torch.cat((self._table, room)) if self._rows else room
        earlier = self._table[: self._rows]
        near = float((earlier - row.flatten()).square().sum(dim=1).min().sqrt()) if self._rows else math.inf
        self._table[self._rows] = row.flatten()
        self._rows += 1
        return near


class Spaced:
    """Answers for `drive`: refuses a row of which an earlier one, refused or not, lies within `spacing` (l2); else class 0."""

    def __init__(self, spacing: float) -> None:
        self.spacing, self.rows, self.refused = spacing, list[Tensor](), 0
        self._history = History()

    def __call__(self, rows: Tensor) -> Answer:
        hits = torch.tensor([self._history.nearest(row) < self.spacing for row in rows])
        self.rows += rows
        self.refused += int(hits.sum())
        return Answer(torch.where(hits, -1, 0), None, hits.to(torch.uint8) * REJECTED)


class Guarded(Plane):
    """A plane behind a gate with a history for each account: refuses rows within `spacing` (l2) of an earlier one.

    Args:
        spacing: in l2.
        strikes: refusals after which an account is banned, or None.
        garbage: scores of refused rows.
    """

    def __init__(self, spacing: float, strikes: int | None = None, garbage: float = 0.0) -> None:
        super().__init__()
        self.spacing, self.strikes, self.garbage = spacing, strikes, garbage
        self.histories: defaultdict[int, History] = defaultdict(History)
        self.hits: Counter[int] = Counter()

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = super().answer(rows, accounts)
        assert answer.scores is not None
        for i, (row, account) in enumerate(zip(rows, accounts.tolist(), strict=True)):
            status = self.judge(row, account)
            if status != ANSWERED:
                answer.labels[i], answer.status[i], answer.scores[i] = 1, status, self.garbage
        return answer

    def judge(self, row: Tensor, account: int) -> int:
        if self.strikes is not None and self.hits[account] >= self.strikes:
            return BANNED
        hit = self.histories[account].nearest(row) < self.spacing
        self.hits[account] += hit
        return REJECTED if hit else ANSWERED


class RefusesOne(Plane):
    """A plane that refuses one row by its number from 1, the evaluator's first one not counted."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        before = sum(map(len, self.seen))
        answer = super().answer(rows, accounts)
        if before < self.number + 1 <= before + len(rows):
            i = self.number - before
            answer.labels[i], answer.status[i] = -1, REJECTED
        return answer


@dataclass(frozen=True)
class Prober(Attack):
    """Asks a point, then rows around it in random directions, `size` a query, and keeps what it was told.

    Args:
        size: rows a query.
        radius: its own scale; a knob of the same name takes its place.
        pairs: whether rows come in pairs of opposite directions.
        steps: whether the queries are steps.
    """

    name: ClassVar[str] = "prober"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    knobs: ClassVar[tuple[str, ...]] = ("radius",)

    size: int = 30
    radius: float = 0.02
    pairs: bool = False
    steps: bool = False
    told: list[tuple[Tensor, Answer]] = field(default_factory=list)
    made: list[Knob] = field(default_factory=list)

    def search(self, task: Task) -> Search:
        centre, generator = task.image[None], task.generator

        def draw(value: float, n: int) -> Tensor:
            noise = torch.randn(n, *task.image.shape, generator=generator)
            return centre + value * torch.nn.functional.normalize(noise.flatten(1), dim=1).view_as(noise)

        length = math.sqrt(task.image.numel())
        knob = Knob("radius", 1e-3 * length, length / 8, draw)
        self.made.append(knob)
        yield Query(centre, "init")
        while True:
            rows = draw(knob.scale(self.radius), self.size)
            if self.pairs:
                rows[1::2] = 2 * centre - rows[::2]

            def redraw(positions: list[int], rows: Tensor = rows) -> Tensor:
                fresh = draw(knob.scale(self.radius), len(positions))
                if self.pairs:
                    assert [p ^ 1 for p in positions[::2]] == positions[1::2]  # both or none
                    fresh[1::2] = 2 * centre - fresh[::2]
                rows[positions] = fresh
                return fresh

            groups = tuple(i // 2 for i in range(self.size)) if self.pairs else None
            answer = yield Query(rows.clone(), "step" if self.steps else "probe", redraw, (knob,), groups)
            self.told.append((rows, answer))


@dataclass(frozen=True)
class Line(Attack):
    """Asks points of a line closing in on the middle, one by one, none of which can be drawn again."""

    name: ClassVar[str] = "line"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    told: list[int] = field(default_factory=list)

    def search(self, task: Task) -> Search:
        end, width = unit(tuple(task.image.shape), 5), 2.0
        while width > 1e-3:
            answer = yield Query((task.image + width * end).clamp(0, 1)[None], "line")
            self.told.append(int(answer.status[0]))
            width /= 2
