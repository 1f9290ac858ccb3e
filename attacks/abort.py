"""The policy of an attacker that is frightened off: the first refusal ends the search.

So attacks are judged in the papers on stateful gates. Without this wrapper an attack persists: a refused row tells it nothing,
costs a query, and it goes on.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import cache

from robustbox.protocol import Answer, Query, Search, Task

from .wrapper import Collected, Wrapper, wrapped


@dataclass(frozen=True, kw_only=True)
class Abort(Wrapper):
    """An attack that ends at the first row that a gate refuses. Asks row by row: none is sent after a refused one."""

    def search(self, task: Task) -> Search:
        answer: Answer | None = None
        with closing(self.inner().search(task)) as inner:
            while True:
                try:
                    query = next(inner) if answer is None else inner.send(answer)
                except StopIteration:
                    return
                collected = Collected(len(query.rows))
                for position in range(len(query.rows)):
                    one = yield Query(query.rows[position : position + 1], query.kind, account=query.account)
                    collected.put([position], one)
                    if one.status.any():
                        return
                answer = collected.answer()


@cache
def load(name: str) -> type[Abort]:
    """Any attack, ended by the first refusal: `abort:nes` is what the papers on stateful gates call the standard attack."""
    return wrapped(Abort, "abort", name)
