"""What a paid service has cost, at least and at most, and the stop before it costs too much."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from threading import Lock

from robustbox.errors import InputError, ModelError

_SLACK = 1e-9
"""What adding up floats may be off."""


class Purse:
    """Rows bought from a service, counted from all threads.

    Args:
        price: of 1000 rows, or None where the service is free.
        currency: of the price.
        most: no rows are bought that could bring the cost above this; or None.
        file: a database that keeps the cost over many runs and processes, or None. What a process had in flight when it
            was killed counts as bought.

    Attributes (of the run that `begin` named last):
        requests: sent, repeats included; repeats: of these, sent again.
        answered: rows that were answered: bought.
        doubtful: rows of requests that failed, of which nobody knows whether the service charged them.
    """

    def __init__(self, price: float | None, currency: str, most: float | None, file: str | None) -> None:
        self.price, self.currency, self.most, self.file = price or 0.0, currency, most, file
        self.requests = self.repeats = self.answered = self.doubtful = 0
        self._reserved = 0
        self._run, self._known = "", 0  # the key of the run, and how many rows of it this process bought before
        self._bought: Counter[str] = Counter()  # by this process, for each run
        self._elsewhere = 0  # bought by other processes
        self._twice = 0  # counted twice, as they were sent again under one key
        self._lock = Lock()
        if file is not None:
            self._open(file)

    def begin(self, run: str) -> None:
        """A run begins or goes on, under a key that is its own: its traffic is counted by itself."""
        with self._lock:
            self.requests = self.repeats = self.answered = self.doubtful = 0
            self._run, self._known = run, self._bought[run]

    def sent(self, again: bool) -> None:
        """A request is sent."""
        with self._lock:
            self.requests += 1
            self.repeats += again

    def reserve(self, rows: int) -> None:
        """Set money aside for a request of so many rows, before it is sent.

        Raises:
            ModelError: there is not enough.
        """
        with self._lock:
            cost = rows * self.price / 1000
            if (spent := self._add(cost)) is not None:
                raise ModelError(
                    f"{rows} more rows could bring the cost above max_cost {self.most:g} {self.currency}: "
                    f"{spent:.6g} {self.currency} are spent; they were not sent"
                )
            self._reserved += rows

    def settle(self, rows: int, answered: bool) -> None:
        """The rows of a request were answered, or perhaps charged all the same."""
        with self._lock:
            self._reserved -= rows
            self._bought[self._run] += rows
            if answered:
                self.answered += rows
            else:
                self.doubtful += rows

    def recall(self, rows: int, answered: bool) -> None:
        """Rows were bought, or perhaps bought, in an earlier session of the run; where there is a file, it has them."""
        with self._lock:
            own = min(self._known, rows)
            self._known -= own
            self._elsewhere += rows - own
            if answered:
                self.answered += rows
            else:
                self.doubtful += rows

    def resolve(self, rows: int) -> None:
        """Rows are in doubt no more: they were answered in the end, under the key that they had, and are charged once."""
        with self._lock:
            self.doubtful -= rows
            self._twice += rows

    def release(self, rows: int) -> None:
        """The rows of a request cost nothing."""
        with self._lock:
            self._reserved -= rows
            if self.file is not None:
                self._add(-rows * self.price / 1000)

    def describe(self) -> dict[str, object]:
        """The traffic of the run as plain JSON values: requests of this session; rows and their cost of all its sessions."""
        with self._lock:
            doubtful = self.doubtful + self._reserved  # what was in flight when the run was interrupted
            found: dict[str, object] = {
                "requests": self.requests,
                "repeats": self.repeats,
                "rows_answered": self.answered,
                "rows_doubtful": doubtful,
            }
            if self.price:
                found |= {
                    "price_per_1000": self.price,
                    "currency": self.currency,
                    "cost_at_least": self.answered * self.price / 1000,
                    "cost_at_most": (self.answered + doubtful) * self.price / 1000,
                    "max_cost": self.most,
                }
            return found

    def _add(self, cost: float) -> float | None:
        """Add to what is spent; where that would be too much, add nothing and return what is."""
        if self.file is None:
            rows = sum(self._bought.values()) + self._elsewhere - self._twice + self._reserved  # of all runs
            spent = rows * self.price / 1000
            return spent if self.most is not None and spent + cost > self.most + _SLACK else None
        with closing(sqlite3.connect(self.file, timeout=60, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            spent = float(database.execute("SELECT spent FROM purse").fetchone()[0])
            if cost > 0 and self.most is not None and spent + cost > self.most + _SLACK:
                database.execute("ROLLBACK")
                return spent
            database.execute("UPDATE purse SET spent = ?", (spent + cost,))
            database.execute("COMMIT")
        return None

    def _open(self, file: str) -> None:
        """Make the database, or see that it is one of ours and of this currency."""
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("CREATE TABLE IF NOT EXISTS purse (currency TEXT NOT NULL, spent REAL NOT NULL)")
                found = database.execute("SELECT currency FROM purse").fetchone()
                if found is None:
                    database.execute("INSERT INTO purse VALUES (?, 0)", (self.currency,))
                database.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"the ledger {file} cannot be used: {error}") from error
        if found is not None and found[0] != self.currency:
            raise InputError(f"the ledger {file} counts {found[0]}, not {self.currency}")
