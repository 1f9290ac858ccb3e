"""Rows to which the model failed to give answers: what was drawn or decided about them waits until they are sent again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Unanswered(Generic[T]):
    """Something about each row that got no answer, by account, in the order in which the rows were sent."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[T]] = {}

    def keep(self, accounts: Sequence[int], things: Sequence[T]) -> None:
        """Keep what belongs to the rows of a pass that failed, sent by n accounts."""
        for account, thing in reversed([*zip(accounts, things, strict=True)]):
            self._waiting.setdefault(account, deque()).appendleft(thing)  # what waits already comes after these

    def take(self, account: int) -> T | None:
        """What was kept about the first row of an account that waits; None where none does."""
        waiting = self._waiting.get(account)
        if waiting is None:
            return None
        thing = waiting.popleft()
        if not waiting:
            self.forget(account)
        return thing

    def forget(self, account: int) -> None:
        """Wait for nothing more of an account."""
        self._waiting.pop(account, None)
