"""The policy of an attacker that is frightened off: the first refusal ends the search.

So attacks are judged in the papers on stateful gates. Without this wrapper an attack persists: a refused row tells it nothing,
costs a query, and it goes on.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cache

from robustbox.protocol import Answer, Query, Search, Task

from .wrapper import Collected, Wrapper, relayed, wrapped


@dataclass(frozen=True, kw_only=True)
class Abort(Wrapper):
    """An attack that ends at the first row that a gate refuses. Asks row by row: none is sent after a refused one."""

    def search(self, task: Task) -> Search:
        return relayed(self.inner().search(task), _row_by_row)


def _row_by_row(query: Query) -> Generator[Query, Answer, Answer | None]:
    """The answer to a query whose rows are asked one after the other; None after a refused one."""
    collected = Collected(len(query.rows))
    for position in range(len(query.rows)):
        one = yield Query(query.rows[position : position + 1], query.kind, account=query.account)
        collected.put([position], one)
        if one.status.any():
            return None
    return collected.answer()


@cache
def load(name: str) -> type[Abort]:
    """Any attack, ended by the first refusal: `abort:nes` is what the papers on stateful gates call the standard attack."""
    return wrapped(Abort, "abort", name)
