"""What a stateful gate remembers: fingerprints of earlier queries, and what they say of a new one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol


class Verdict(NamedTuple):
    """What a memory says of a query.

    Args:
        hit: whether it is refused.
        match: the number of the earlier row that it resembles most; -1: none in particular.
        likeness: how much, in the memory's own units.
    """

    hit: bool
    match: int
    likeness: int = 0


class Memory(ABC):
    """What is remembered of the queries of one scope. Rows are numbered from 0 in the order in which they were stored."""

    @abstractmethod
    def judge(self, print: Any) -> Verdict:
        """Whether a query with this fingerprint is refused, as things stand; stores nothing."""

    @abstractmethod
    def store(self, print: Any, verdict: Verdict) -> int:
        """Remember a fingerprint, about which `judge` has just said this; its number."""

    @abstractmethod
    def forget(self, before: int) -> None:
        """Forget the rows with lower numbers."""

    @property
    @abstractmethod
    def stored(self) -> int:
        """Rows that are remembered."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory in bytes."""


class Index(Protocol):
    """A look-up structure over stored fingerprints, numbered from 0 (`index.py`)."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        ...

    def add(self, print: Any, /) -> int:
        """Store a fingerprint; its number."""
        ...

    def forget(self, before: int) -> None:
        """Forget the rows with lower numbers."""
        ...


class IndexedMemory(Memory):
    """A memory that is one index; a subclass judges."""

    _index: Index

    def store(self, print: Any, verdict: Verdict) -> int:
        return self._index.add(print)

    def forget(self, before: int) -> None:
        self._index.forget(before)

    @property
    def stored(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return self._index.nbytes
