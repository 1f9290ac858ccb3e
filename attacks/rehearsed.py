"""Rehearsal: every row is shown first to a copy of the gate that the attacker runs itself, and sent once that lets it pass.

A gate without a secret (`piha`, `gwad`, an `osd` whose encoder is public) can be run by anybody who knows that it is there: its
history is what the attacker sent. So the attacker need not pay to learn what would be refused, nor choose a scale at which
nearly nothing is. It draws a row again, in private, until the copy takes it, at the least scale at which a share `accept` of
draws pass: selection in place of noise. A row that cannot be drawn again is moved by a little noise, likewise; in l0, where
noise would change every pixel, it is sent as it is. The rows of a query are sent in the order in which the copy took them.

A copy of a gate with a secret (`blacklight`, `qpa`) has another one. What it lets pass is then likely, not certain, to pass.

The scale of each knob is the attack's own until the copy refuses most of what is drawn at it; then it climbs from the least
that makes sense by half at each attempt until something passes, and then by exp(accept - share that passed), less where an
attempt is of few draws.
A row that the copy still refuses after `attempts` draws is sent as it is. The copy remembers what is sent, such rows too; of
rows that are of use only together it remembers none while one is refused.

Query cost: that of the attack; the copy's answers are free. Threat model: the attacker knows which gate stands there, with its
options, and its own queries; not the model. `oars:rehearsed:NAME` also draws again what the real gate refuses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from robustbox import registry
from robustbox.distances import rounded
from robustbox.errors import InputError
from robustbox.protocol import Answer, Knob, Query, Search, Task

from .spacing import LEAST, MOST, moved
from .wrapper import Collected, Unit, Wrapper, relayed, units, wrapped

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
        Copy(self, task).refused(task.image[None], [(0,)])

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
    """The attacker's copy of a gate.

    Attributes:
        history: of one search: what was sent, and what is about to be.
    """

    def __init__(self, settings: Rehearsed, task: Task) -> None:
        recipe = registry.load("defenses", settings.gate)
        if not hasattr(recipe, "histories"):
            raise InputError(f"rehearsed: {settings.gate} is no stateful gate")
        self._gate, self._settings, self._task = recipe(), settings, task
        seed, device = task.generator.initial_seed() ^ 4, task.image.device
        channels, height, width = task.image.shape
        self._histories = self._gate.histories(seed, device, (channels, height, width))
        self.history = self._histories.of(0, task.image[None])
        self._generator = torch.Generator(device).manual_seed(seed)
        self._scales: dict[Knob, _Scale] = {}
        root = task.image.numel() ** 0.5
        self._length = _Scale(LEAST * root / 8, MOST * root, settings.accept)  # of the noise that moves a row

    def ask(self, query: Query) -> Generator[Query, Answer, Answer]:
        """Ask rows that the copy lets pass in place of the query's; they can be drawn again if the query's can.

        They are sent in the order in which the copy took them, since a gate may judge a row by the one before it.
        """
        rows = query.rows.clone()
        order = self._settle(query, rows, list(range(len(rows))))

        def again(places: list[int]) -> Tensor:
            assert query.redraw is not None
            positions = [order[place] for place in places]
            rows[positions] = query.redraw(positions)
            self._settle(query, rows, positions)
            return rows[positions]

        redraw = again if query.redraw is not None else None
        groups = None if query.groups is None else tuple(query.groups[position] for position in order)
        answer = yield Query(rows[order], query.kind, redraw, (), groups, query.account)
        collected = Collected(len(rows))
        collected.put(order, answer)
        return collected.answer()

    @torch.no_grad()
    def refused(self, rows: Tensor, asked: list[Unit], sent: bool = False) -> list[Unit]:
        """Those of some units of rows [n,C,H,W] of which the copy refuses a row, as they come one after the other.

        It remembers the units that pass, and where they are `sent` the others too.
        """
        flat = [position for unit in asked for position in unit]
        known = [self.history.secret] * len(flat)
        prints = iter(self._gate.prints(rounded(rows[flat], self._task.levels), known))
        return [unit for unit in asked if not self._takes([next(prints) for _ in unit], sent)]

    def _takes(self, prints: list[Any], sent: bool) -> bool:
        """Whether the copy lets all rows with these fingerprints pass; if so, or where they are `sent`, it remembers them."""
        history, fine, before = self.history, True, None
        for number, fingerprint in enumerate(prints, 1):
            verdict = history.memory.judge(fingerprint)
            fine &= not verdict.hit
            if not (fine or sent):
                history.memory = history.memory if before is None else before
                return False
            if number == 1 < len(prints) and not sent:
                before = copy.deepcopy(history.memory)  # the next rows are judged by this one, which may not be sent
            self._histories.store(history, fingerprint, verdict, None)
        return fine

    def _settle(self, query: Query, rows: Tensor, positions: list[int]) -> list[int]:
        """Draw or move rows [n,C,H,W] at these positions until the copy has let each pass, in place.

        Returns:
            the positions in the order in which the copy remembers their rows.
        """
        wanted, order = set(positions), list[int]()
        waiting = [unit for unit in units(query) if wanted.issuperset(unit)]
        attempts = 0 if query.redraw is None and self._task.norm == "l0" else self._settings.attempts
        for attempt in range(attempts + 1):
            last = attempt == attempts
            left = self.refused(rows, waiting, sent=last)
            refused = set() if last else set(left)
            order += [position for unit in waiting if unit not in refused for position in unit]
            self._follow(query, len(waiting) - len(left), len(waiting), first=attempt == 0)
            waiting = left
            if not waiting or last:
                break
            again = [position for unit in waiting for position in unit]
            if query.redraw is not None:
                rows[again] = query.redraw(again)
            else:
                length = self._length.value
                rows[again] = torch.cat(
                    [moved(self._task, query.rows[p : p + 1], length, self._generator) for p in again]
                )
        return order

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


@cache
def load(name: str) -> type[Rehearsed]:
    """Any attack with its rows tried in private on a copy of the gate: `rehearsed:qeba` passes a gate without a secret."""
    return wrapped(Rehearsed, "rehearsed", name)
