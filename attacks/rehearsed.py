"""Rehearsal: every row is shown first to a copy of the gate that the attacker runs itself, and sent once that lets it pass.

A gate without a secret (`piha`, `gwad`, an `osd` whose encoder is public) can be run by anybody who knows that it is there: its
history is what the attacker sent. So the attacker need not pay to learn what would be refused, nor choose a scale at which
nearly nothing is. It draws a row again, in private, until the copy takes it, at the least scale at which a share `accept` of
draws pass: selection in place of noise. A row that cannot be drawn again is moved by a little noise, likewise.

A copy of a gate with a secret (`blacklight`, `qpa`) has another one. What it lets pass is then likely, not certain, to pass.

The scale of each knob is the attack's own until the copy refuses most of what is drawn at it; then it climbs from the least
that makes sense by half at each attempt until something passes, and then by exp(accept - share that passed), less where an
attempt is of few draws.
A row that the copy still refuses after `attempts` draws is sent as it is.

Query cost: that of the attack; the copy's answers are free. Threat model: the attacker knows which gate stands there, with its
options, and its own queries; not the model. `oars:rehearsed:NAME` also draws again what the real gate refuses.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from robustbox import registry
from robustbox.distances import rounded
from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, BlackBox, Defense, Knob, Query, Search, Task

from .spacing import LEAST, MOST, moved
from .wrapper import Wrapper, relayed, units, wrapped

CLIMB, MANY = 1.5, 4
"""By how much a scale grows at an attempt before anything passed at it; draws from which on a share is taken as it is."""


@dataclass(frozen=True, kw_only=True)
class Rehearsed(Wrapper):
    """Rehearsal: rows are drawn again in private until the attacker's own copy of the gate lets them pass.

    Args:
        gate: name of the stateful defense of which the attacker runs a copy, with its default options.
        accept: share of the draws that the copy is to let pass, at which scales are kept.
        attempts: times that a row is drawn or moved before it is sent as it is.
    """

    gate: str = "piha"
    accept: float = 0.3
    attempts: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.accept < 1:
            raise InputError(f"accept must be between 0 and 1, got {self.accept}")
        if self.attempts < 1:
            raise InputError(f"attempts must be at least 1, got {self.attempts}")
        super().__post_init__()

    def check(self, task: Task) -> None:
        """Begin a copy, so that a gate that is unknown, or not for these images, is refused before a query is spent."""
        super().check(task)
        Copy(self, task).refuses(task.image[None])

    def search(self, task: Task) -> Search:
        return relayed(self.inner().search(task), Copy(self, task).ask)


class _Scale:
    """The least scale at which about a share `accept` of draws pass, between two ends."""

    def __init__(self, low: float, high: float, accept: float, integer: bool = False) -> None:
        self._low, self._high, self._accept, self._integer = low, high, accept, integer
        self._value, self._passed = low, False

    @property
    def value(self) -> float:
        return float(round(self._value)) if self._integer else self._value

    def observe(self, passed: int, drawn: int) -> None:
        """Take how many of the draws of an attempt passed."""
        self._passed |= passed > 0
        weight = min(drawn / MANY, 1.0)
        self._value *= math.exp((self._accept - passed / drawn) * weight) if self._passed else CLIMB
        self._value = min(max(self._value, self._low), self._high)


class Copy:
    """The attacker's copy of a gate, with the history of one search: what was sent."""

    def __init__(self, settings: Rehearsed, task: Task) -> None:
        recipe = registry.load("defenses", settings.gate)
        try:
            # What it refuses is not sent: nothing to remember, and no hit after which to forget.
            defense: Defense = recipe(action="reject", store_rejected=False, reset_on_hit=False)
        except TypeError:
            raise InputError(f"rehearsed: {settings.gate} is no stateful gate") from None
        seed = task.generator.initial_seed() ^ 4
        self._box, self._settings, self._task = defense.wrap(_Silent(task.image.device), seed), settings, task
        self._generator = torch.Generator(task.image.device).manual_seed(seed)
        self._scales: dict[Knob, _Scale] = {}
        root = task.image.numel() ** 0.5
        self._length = _Scale(LEAST * root / 8, MOST * root, settings.accept)  # of the noise that moves a row

    def ask(self, query: Query) -> Generator[Query, Answer, Answer]:
        """Ask rows that the copy lets pass in place of the query's; they can be drawn again if the query's can."""
        rows = query.rows.clone()

        def again(positions: list[int]) -> Tensor:
            assert query.redraw is not None
            rows[positions] = query.redraw(positions)
            self._settle(query, rows, positions)
            return rows[positions]

        self._settle(query, rows, list(range(len(rows))))
        redraw = again if query.redraw is not None else None
        answer = yield Query(rows.clone(), query.kind, redraw, (), query.groups, query.account)
        return answer

    def refuses(self, rows: Tensor) -> list[bool]:
        """Whether the copy refuses each of the rows [n,C,H,W], one after the other; it remembers those that pass."""
        status = self._box.answer(rounded(rows, self._task.levels), torch.zeros(len(rows), dtype=torch.long)).status
        return (status != ANSWERED).tolist()

    def _settle(self, query: Query, rows: Tensor, positions: list[int]) -> None:
        """Draw or move rows [n,C,H,W] at these positions until the copy has let each pass, in place."""
        wanted = set(positions)
        waiting = [unit for unit in units(query) if wanted.issuperset(unit)]
        for attempt in range(self._settings.attempts + 1):
            asked = [position for unit in waiting for position in unit]
            refused = {p for p, hit in zip(asked, self.refuses(rows[asked]), strict=True) if hit}
            left = [unit for unit in waiting if not refused.isdisjoint(unit)]
            self._follow(query, len(waiting) - len(left), len(waiting), first=attempt == 0)
            waiting = left
            if not waiting or attempt == self._settings.attempts:
                return
            again = [position for unit in waiting for position in unit]
            if query.redraw is not None:
                rows[again] = query.redraw(again)
            else:
                length = self._length.value
                rows[again] = torch.cat(
                    [moved(self._task, query.rows[p : p + 1], length, self._generator) for p in again]
                )

    def _follow(self, query: Query, passed: int, drawn: int, first: bool) -> None:
        """Take how many draws passed; the first ones of a query that cannot be drawn again were not moved."""
        if query.redraw is None:
            if not first:
                self._length.observe(passed, drawn)
            return
        for knob in query.knobs:
            scale = self._scales.get(knob)
            if scale is None:
                if passed < self._settings.accept * drawn:  # the attack's own scale does not do
                    self._scales[knob] = scale = _Scale(knob.low, knob.high, self._settings.accept, knob.integer)
                    knob.value = scale.value
                return
            if scale.value < knob.high or passed:
                scale.observe(passed, drawn)
                knob.value = scale.value
                return  # the next knob is turned where this one is of no use


class _Silent(BlackBox):
    """What stands behind the copy: answers class 0 to every row."""

    name, classes, scores = "nothing", 1, "none"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return Answer.of(torch.zeros(len(rows), dtype=torch.long, device=rows.device))


@cache
def load(name: str) -> type[Rehearsed]:
    """Any attack with its rows tried in private on a copy of the gate: `rehearsed:qeba` passes a gate without a secret."""
    return wrapped(Rehearsed, "rehearsed", name)
