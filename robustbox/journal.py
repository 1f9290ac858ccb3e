"""The journal of a run: `journal.sqlite` holds every answer before an attack sees it, so that no row is bought twice.

A run is a function of its command, of the answers of its model, and of the times at which it looked at its clock (from which
it learns how many rows to fuse). The journal holds the three in order. Started again with the same command, the run goes
through it from the beginning, is told again what was answered and when, and buys on where the journal ends, in the very
state in which it was stopped. docs/journal.md is the user's page.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustbox.errors import InputError
from robustbox.events import Event, EventLog

BEGIN, SESSION, SENT, ANSWERED, TOO_LARGE, END = range(6)
"""A run and its identity; the same run again; a pass is sent; its answer; it did not fit the device; the run has ended."""


class Journal:
    """The journal of one run, locked until `close`.

    Args:
        path: the file; made where there is none.
        fresh: forget what it holds.

    Attributes:
        finished: whether the run has come to its end.
        sessions: how often it was started.
        sent, answered: rows that the model was asked, and that it answered, in all sessions.

    Raises:
        InputError: another run is writing to it, it is damaged, or it cannot be written.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.finished, self.sessions, self.sent, self.answered = False, 0, 0, 0
        self._identity: dict[str, Any] = {}
        self._log = EventLog(path, fresh)
        try:
            for event in self._log.read(verify=True):
                self._count(event)
        except BaseException:
            self._log.close()
            raise
        self._ahead: Iterator[Event] | None = None  # what is still to be replayed; None when the run is live
        self._events: deque[Event] = deque()  # read from there before their turn, for their times
        self._times: deque[float] = deque()  # of the events that were read
        self._unwritten: list[float] = []
        self._now, self._zero = 0.0, 0.0

    @property
    def key(self) -> str:
        """A name that no other run has, and that stays when the run goes on."""
        return str(self._identity.get("key", ""))

    @property
    def in_flight(self) -> int:
        """Rows that were asked and whose answers were never written: they were asked again, or will be."""
        return self.sent - self.answered

    def summary(self) -> dict[str, int]:
        """What a result must record: how often the run was started, and the rows that were perhaps bought twice."""
        return {"sessions": self.sessions, "in_flight": self.in_flight}

    def begin(self, identity: Mapping[str, Any], durable: bool = False) -> None:
        """Begin the run of this identity, or go on with it.

        Args:
            identity: what the run's queries depend on: plain JSON values.
            durable: whether what is written shall outlive the loss of power.

        Raises:
            InputError: the journal is another run's.
        """
        content = json.dumps(identity, sort_keys=True)
        if not self.sent:
            self._log.clear()
            self.sessions = 0
            named = json.dumps({**identity, "key": uuid.uuid4().hex}, sort_keys=True)
            self._append(Event(BEGIN, content=named.encode()))
        elif differing := sorted(k for k, v in json.loads(content).items() if self._identity.get(k) != v):
            raise InputError(
                f"the journal in {self.path.parent} belongs to another run (its {', '.join(differing)} differ): to go on, "
                "give that run's own command; else choose another folder, or start over with --fresh (fresh=True)"
            )
        else:
            self._append(Event(SESSION))
        if durable:
            self._log.durable()
        self._ahead = self._log.read()

    def now(self) -> float:
        """The run's clock: the seconds that it took so far. What is replayed takes as long as it took before."""
        while self._ahead is not None and not self._times:
            self._look_ahead()
        if self._times:
            self._now = self._times.popleft()
        else:
            self._now = time.perf_counter() - self._zero
            self._unwritten.append(self._now)
        return self._now

    def replay(self, request: bytes, rows: int) -> tuple[bytes | None, int]:
        """The answer to the next pass, or None where it was not answered yet; and how often it was sent before.

        Args:
            request: the digest of the pass.
            rows: its size.

        Raises:
            InputError: the run asks something else than it did before.
            torch.OutOfMemoryError: the device could not hold that pass before.
        """
        sent = 0
        while self._events or self._look_ahead():
            event = self._events.popleft()
            sent += event.kind == SENT
            if event.kind == SENT and (event.content, event.rows) != (request, rows):
                raise InputError(
                    f"the journal in {self.path.parent} does not fit: the run asks other rows than it did before, "
                    "as on another device or with other versions; start over with --fresh (fresh=True)"
                )
            if event.kind == ANSWERED:
                return event.content, sent
            if event.kind == TOO_LARGE:
                raise torch.OutOfMemoryError("the device could not hold this pass before")
        return None, sent

    def send(self, request: bytes, rows: int) -> None:
        """Write down that a pass is about to be sent."""
        self._append(Event(SENT, rows, request, self._readings()))

    def receive(self, answer: bytes, rows: int) -> None:
        """Write down the answer to the pass that was sent."""
        self._append(Event(ANSWERED, rows, answer))

    def too_large(self, rows: int) -> None:
        """Write down that the device could not hold the pass that was sent."""
        self._append(Event(TOO_LARGE, rows))

    def end(self) -> None:
        """Write down that the run has come to its end."""
        self._append(Event(END, times=self._readings()))

    def absorb(self, events: Iterable[Event]) -> None:
        """Take over the events of another journal, after those that are here: for the record, not for a replay."""
        for event in events:
            self._append(event)

    def close(self) -> None:
        """Give the lock back."""
        self._ahead = None
        self._log.close()

    def _append(self, event: Event) -> None:
        self._log.append(event)
        self._count(event)

    def _count(self, event: Event) -> None:
        if event.kind == BEGIN:
            self._identity = json.loads(event.content)
        self.sessions += event.kind in (BEGIN, SESSION)
        self.sent += event.rows * (event.kind == SENT) - event.rows * (event.kind == TOO_LARGE)
        self.answered += event.rows * (event.kind == ANSWERED)
        self.finished = event.kind == END

    def _readings(self) -> bytes:
        times, self._unwritten = np.array(self._unwritten), []
        return times.tobytes()

    def _look_ahead(self) -> bool:
        """Read one event more of those to be replayed; from the last one on the run is live, and its clock runs."""
        event = next(self._ahead, None) if self._ahead is not None else None
        if event is not None:
            self._events.append(event)
            self._times.extend(np.frombuffer(event.times).tolist())
        elif self._ahead is not None:
            self._ahead = None
            self._zero = time.perf_counter() - self._now
        return event is not None
