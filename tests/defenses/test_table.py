"""The table of stored rows, against a list: what it holds, how many slots it takes, and how often rows move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustbox.defenses import table
from robustbox.defenses.table import RowTable

EMPTY: list[Callable[[int], Any]] = [
    lambda rows: torch.empty(rows, 2),
    lambda rows: np.empty((rows, 2)),
    lambda rows: np.empty(rows, dtype=np.object_),
]


@pytest.fixture(scope="module", autouse=True)
def _small_tables() -> Iterator[None]:
    """Tables of 4 slots, so that 100 rows pass through several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "LEAST", 4)
        yield


def values(rows: Any) -> list[float]:
    """The first value of each row."""
    return [float(np.ravel(row)[0]) for row in rows]


@given(st.sampled_from(EMPTY), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=8))
def test_it_holds_what_a_list_holds(empty: Callable[[int], Any], turns: list[tuple[int, int]]) -> None:
    """Turn by turn so many rows are added, and so many of the oldest forgotten."""
    found: RowTable[Any] = RowTable(empty)
    rows: list[int] = []
    kept_from, copied = 0, 0
    drops = chain.from_iterable([*[0] * (added - 1), gone] for added, gone in turns)
    for number, drop in enumerate(drops):
        slots = found._slots
        assert found.add(number**2) == number
        copied += (found._slots is not slots) * (len(rows) - kept_from)
        rows.append(number**2)
        slots, kept_from = found._slots, min(kept_from + drop, len(rows))
        found.forget(kept_from)
        found.forget(kept_from // 2)  # what is gone already
        copied += (found._slots is not slots) * len(found)
        assert (len(found), found.rows, found.kept_from) == (len(rows) - kept_from, len(rows), kept_from)
        assert values(found.at(np.arange(kept_from, len(rows)))) == rows[kept_from:]
        assert values(found.since(kept_from)) == rows[kept_from:]
        assert len(found._slots) <= max(4 * len(found), 16)
    assert copied <= 3 * len(rows)


@pytest.mark.parametrize("window", [1, 3, 4, 100, 333])
def test_a_window_bounds_it(window: int) -> None:
    """At most two slots for each row that is ever remembered at once, the new one included."""
    found: RowTable[Any] = RowTable(lambda rows: np.empty(rows))
    for number in range(20 * window):
        found.add(number)
        found.forget(number + 1 - window)
        assert len(found._slots) <= max(2 * (window + 1), table.LEAST)
        assert found.nbytes == 8 * len(found._slots)
    assert found.since(found.kept_from).tolist() == list(range(19 * window, 20 * window))


def test_rows_that_are_yet_to_come_are_not_forgotten() -> None:
    found: RowTable[Any] = RowTable(lambda rows: np.empty(rows))
    found.forget(5)
    assert found.add(7) == 0
    assert found.at(0) == 7
