"""One search of an attack on its way through a stateful gate: what OARS (`oars.py`) does with its queries."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustbox.protocol import ANSWERED, BANNED, REJECTED, Answer, Kind, Knob, Query, Search, Task

from .calibration import REFERENCE_ROUNDS, Bounds, Dial, reference_bounds
from .spacing import Guard, Keeper
from .wrapper import Collected, Unit, relayed, units

if TYPE_CHECKING:
    from .oars import OARS

MOVES = 3
"""Times that a refused row which cannot be drawn again is moved and asked again."""


class Passage:
    """One search on its way through a gate.

    Args:
        settings: the options of OARS, and the attack inside.
        task: the task of the search.
    """

    def __init__(self, settings: OARS, task: Task) -> None:
        self._settings, self._task, self._attack = settings, task, settings.wraps.name.rpartition(":")[2]
        self._reference = settings.parity == "reference"
        # Noise changes every pixel: in l0 a row that it moves is another one, far outside the ball.
        unfit = self._reference or (settings.guard == "jitter" and task.norm == "l0")
        guard: Guard = "off" if unfit else settings.guard
        self._moves = MOVES if guard == "jitter" else 0
        self._rounds = REFERENCE_ROUNDS.get(self._attack, settings.rounds) if self._reference else settings.rounds
        self._keeper = Keeper(task, guard)
        self._dials: dict[Knob, Dial] = {}
        self._epoch = 0  # changes whenever a knob does
        self._learnt: set[Dial | None] = set()  # which told the keeper how far apart rows must be
        self._in_a_row = 0  # rows that were refused, one after the other
        self._careful = False  # bans were seen
        self._closed = self._scout_open = False  # the account in use was banned; there is one beside it
        self._generator = torch.Generator(task.image.device).manual_seed(task.generator.initial_seed() ^ 2)
        self._order = torch.Generator().manual_seed(task.generator.initial_seed() ^ 3)
        self._last: Answer | None = None

    def run(self, inner: Search) -> Search:
        """Ask what the attack asks, until it ends or nothing passes any more."""

        def ask(query: Query) -> Generator[Query, Answer, Answer | None]:
            answer = yield from self._pass(query)
            return answer if self._in_a_row < self._settings.give_up else None

        return relayed(inner, ask)

    def _pass(self, query: Query) -> Generator[Query, Answer, Answer]:
        """One query of the attack, in as many as it takes."""
        rows, drawn = query.rows.clone(), torch.full((len(query.rows),), self._epoch)
        dials = [self._dial(knob) for knob in query.knobs]
        collected = Collected(len(rows), self._last)
        waiting, tries = deque(units(query)), Counter[Unit]()
        while waiting and self._in_a_row < self._settings.give_up:
            if self._settings.scout or self._reference:
                for dial in dials:
                    yield from self._calibrate(dial)
            active = next((dial for dial in dials if not dial.useless), None)
            chosen = self._portion(waiting, active)
            positions = [position for unit in chosen for position in unit]
            if query.redraw is not None and self._settings.scatter and query.kind == "probe":
                positions = self._scatter(query, rows, chosen)
            elif query.redraw is not None:
                stale = [position for position in positions if drawn[position] != self._epoch]
                if stale:
                    rows[stale], drawn[stale] = query.redraw(stale), self._epoch
            else:
                rows[positions], kept = self._keeper.place(rows[positions])
                self._in_a_row += len(positions) - len(kept)  # not asked, but as good as refused
                positions = [positions[k] for k in kept]
                chosen = [unit for unit in chosen if unit[0] in positions]
            if positions:
                kind: Kind = "calibrate" if active is not None and active.search is not None else query.kind
                answer = yield Query(rows[positions], kind, account=query.account)
                collected.put(positions, answer)
                self._learn(rows[positions], answer, active, random=query.redraw is not None)
                bad = {p for p, status in zip(positions, answer.status.tolist(), strict=True) if status != ANSWERED}
                for unit in chosen:
                    if not bad.isdisjoint(unit) and tries[unit] < self._limit(query):
                        tries[unit] += 1
                        drawn[list(unit)] = -1
                        waiting.append(unit)
        self._last = collected.answer()
        if query.kind == "step" and self._last.status.all():  # none was answered
            for dial in dials:
                dial.grow()
            self._epoch += 1
        return self._last

    def _scatter(self, query: Query, rows: Tensor, chosen: list[Unit]) -> list[int]:
        """Draw each unit again at a scale of its own, and put them in random order."""
        assert query.redraw is not None
        for unit in chosen:
            stretch = math.exp(self._settings.scatter * float(torch.randn((), generator=self._order)))
            for knob in query.knobs:
                knob.stretch = stretch
            rows[list(unit)] = query.redraw(list(unit))
        for knob in query.knobs:
            knob.stretch = 1.0
        positions = [position for unit in chosen for position in unit]
        order = torch.randperm(len(positions), generator=self._order).tolist()
        return [positions[k] for k in order]

    def _limit(self, query: Query) -> int:
        """How often a row is asked again when it is refused."""
        return self._rounds if query.redraw is not None else self._moves

    def _portion(self, waiting: deque[Unit], dial: Dial | None) -> list[Unit]:
        """The units to ask next: few rows while a refusal is likely, or dear."""
        if not self._careful and (dial is None or dial.tried):
            everything = list(waiting)
            waiting.clear()
            return everything
        few = [waiting.popleft()]
        while waiting and sum(map(len, few)) < self._settings.chunk:
            few.append(waiting.popleft())
        return few

    def _learn(self, rows: Tensor, answer: Answer, dial: Dial | None, random: bool) -> None:
        """What the statuses of rows tell of the gate."""
        answered, judged = answer.status == ANSWERED, answer.status != BANNED
        self._closed = not bool(judged.all())
        self._careful |= self._closed
        self._in_a_row = 0 if answered.any() else self._in_a_row + len(rows)
        if not judged.any():
            return
        rows, answered = rows[judged.to(rows.device)], answered[judged]
        settled = dial is not None and dial.search is None and dial.knob.value is not None
        fresh = random and settled and dial not in self._learnt
        self._keeper.note(rows, answered, "settled" if fresh else "drawn" if random else "placed")
        if fresh:
            self._learnt.add(dial)
        if dial is not None and not self._reference and dial.observe(int((~answered).sum()), len(rows), self._careful):
            self._epoch += 1

    def _dial(self, knob: Knob) -> Dial:
        if knob not in self._dials:
            known = reference_bounds(self._attack, knob.name, self._task.image) if self._reference else None
            bounds = Bounds(knob.low, knob.high, self._settings.tolerated, self._settings.trial)
            self._dials[knob] = dial = Dial(knob, known or bounds)
            if known:
                dial.begin()
            dial.useless = self._reference and not known
        return self._dials[knob]

    def _calibrate(self, dial: Dial) -> Generator[Query, Answer, None]:
        """A knob's search, if it is in one, with rows of its own: around decoys, or, as the reference, around the image."""
        if dial.search is None:
            return
        size = dial.bounds.samples if self._reference else self._settings.chunk
        while dial.search is not None:
            value, centre = dial.search.value, self._task.image[None] if self._reference else self._decoy()
            if centre is not None and not self._reference:
                yield from self._scout(centre)  # as the gate knows the place where the attack stands
            while dial.search is not None and dial.search.value == value:
                rows = dial.knob.draw(value, size)
                if centre is not None:  # the same proposals, around another image
                    rows = (centre + rows - self._place(dial.knob)).clamp_(0, 1)
                status = (yield from self._scout(rows)).status
                dial.observe(int((status == REJECTED).sum()), int((status != BANNED).sum()), self._careful)
        self._epoch += 1

    def _scout(self, rows: Tensor) -> Generator[Query, Answer, Answer]:
        """Ask rows of the search for a value, on an account of their own where the attacker has another one."""
        spare = self._task.accounts is None or self._task.accounts > self._closed
        apart = not self._reference and (self._scout_open or spare)
        answer = yield Query(rows, "calibrate", account=int(apart))
        banned = bool((answer.status == BANNED).any())
        self._careful |= banned
        if apart:
            self._scout_open = not banned
        else:
            self._closed = banned
        return answer

    @staticmethod
    def _place(knob: Knob) -> Tensor:
        """Where the attack stands [1,C,H,W]: a proposal that hardly differs from it."""
        return knob.draw(knob.low if knob.integer else knob.low / 100, 1)

    def _decoy(self) -> Tensor | None:
        """An image of the attacker's own [1,C,H,W], if it has any."""
        if self._task.pool is None:
            return None
        images = self._task.pool[0]
        index = int(torch.randint(len(images), (), generator=self._generator, device=self._task.image.device))
        return images[index : index + 1].to(self._task.image.device)
