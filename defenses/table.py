"""A table of stored rows that forgets the oldest: its size follows what is remembered, not what was ever stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar


class Array(Protocol):
    """What an array of numpy and a tensor have in common."""

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...

    def __setitem__(self, key: Any, value: Any, /) -> None: ...


Slots = TypeVar("Slots", bound=Array)

LEAST = 64
"""Slots of the smallest table."""


class RowTable(Generic[Slots]):
    """Rows in the slots of one array, numbered from 0 in the order in which they were added.

    Where all slots are taken, or more of them by forgotten rows than by others, the remembered rows move to a new array of
    twice as many slots. So a row costs O(1) on average, and there are at most four slots for each remembered row, or 256.

    Args:
        empty: makes an array of so many rows, whatever they hold.

    Attributes:
        first: the number of the row in the first slot; that row may be forgotten.
        kept_from: the number of the oldest row that is remembered.
        rows: how many were added.
    """

    def __init__(self, empty: Callable[[int], Slots]) -> None:
        self._empty = empty
        self._slots = empty(LEAST)
        self.first = self.kept_from = self.rows = 0

    def __len__(self) -> int:
        """Rows that are remembered."""
        return self.rows - self.kept_from

    @property
    def nbytes(self) -> int:
        """Memory of all slots, in bytes; free ones and those of forgotten rows are slots too."""
        return self._slots.nbytes

    def add(self, row: Any) -> int:
        """Add a row; its number."""
        if self.rows - self.first == len(self._slots):
            self._move()
        self._slots[self.rows - self.first] = row
        self.rows += 1
        return self.rows - 1

    def forget(self, before: int) -> None:
        """Forget the rows whose numbers are below `before`."""
        self.kept_from = max(self.kept_from, min(before, self.rows))
        if self.kept_from - self.first > max(len(self), LEAST):
            self._move()

    def at(self, numbers: Any) -> Any:
        """The row of a number, or the rows of an array of numbers; none of them forgotten."""
        return self._slots[numbers - self.first]

    def since(self, number: int) -> Slots:
        """A view of the rows from a number on, which is at least `first`."""
        rows: Slots = self._slots[number - self.first : self.rows - self.first]
        return rows

    def _move(self) -> None:
        """Move the remembered rows to an array of twice as many slots."""
        kept = self.since(self.kept_from)
        self._slots = self._empty(max(LEAST, 2 * len(self)))
        self._slots[: len(self)] = kept
        self.first = self.kept_from
