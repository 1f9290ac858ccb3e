"""The look-ups: exact against brute force across every way of storing rows, and no dearer when all rows are alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from robustbox.defenses import index
from robustbox.defenses.index import SketchIndex, Tokens
from robustbox.defenses.neighbours import DenseIndex

ROWS = st.lists(st.sets(st.integers(-6, 30), max_size=8), max_size=60)


@pytest.fixture(scope="module", autouse=True)
def _small_tiers() -> Iterator[None]:
    """Tiers of 4, 8, 16 rows, so that 60 rows pass through all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "FRESH", 4)
        yield


def tokens(row: set[int]) -> Tokens:
    return np.array(sorted(row), dtype=np.int64)


@given(ROWS, st.sets(st.integers(-6, 30), max_size=8), st.integers(0, 60), st.integers(1, 12))
def test_sketches_are_found_as_by_brute_force(rows: list[set[int]], query: set[int], gone: int, k: int) -> None:
    found = SketchIndex()
    for number, row in enumerate(rows):
        assert found.add(tokens(row)) == number
        if number == gone // 2:
            found.forget(number // 2)
    gone = min(gone, len(rows))
    found.forget(gone)
    gone = max(gone, found.add(tokens(set())) - len(found) + 1)
    shares = [len(row & query) if number >= gone else 0 for number, row in enumerate(rows)]
    most = max(shares, default=0)
    assert found.best(tokens(query)) == (most, shares.index(most) if most else -1)
    expected = sorted([*shares, *[0] * k], reverse=True)[:k]
    assert found.top(tokens(query), k)[0].tolist() == expected
    for enough in (1, 2, most, most + 1):
        assert (found.best(tokens(query), enough)[0] >= enough) == (most >= enough)


@given(st.permutations(range(20)))
def test_the_order_of_inserts_does_not_change_the_best_match(order: list[int]) -> None:
    rows = [set(range(3 * k, 3 * k + 9)) for k in range(20)]
    found = SketchIndex()
    for k in order:
        found.add(tokens(rows[k]))
    most, row = found.best(tokens(rows[7]))
    assert (most, row) == (9, order.index(7))


def test_bytes_a_row() -> None:
    found = SketchIndex()
    for k in range(64):
        found.add(np.arange(50 * k, 50 * k + 50))
    assert found.nbytes == 64 * 50 * 12 + 2 * sys.getsizeof({})  # no token is fresh or common


def test_the_cost_of_a_query_does_not_grow_where_all_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a look-up reads, in bits of bitmaps and rows of lists, among near-identical queries that are hits."""
    monkeypatch.setattr(index, "FRESH", 256)
    read = 0
    original = index._tally

    def tally(bitmaps: list[int], rows: int) -> index.Counts:
        nonlocal read
        read += len(bitmaps) * rows
        return original(bitmaps, rows)

    monkeypatch.setattr(index, "_tally", tally)
    generator = np.random.default_rng(0)
    found = SketchIndex()
    costs = []
    for number in range(4000):
        row = np.arange(50) + 1000 * (generator.random(50) < 0.1) * (1 + number)  # nine tenths of the tokens in common
        read = 0
        assert number == 0 or found.best(row, enough=26)[0] >= 26
        costs.append(read)
        found.add(row)
    assert np.mean(costs[-500:]) < 2 * np.mean(costs[100:600])


@given(st.integers(0, 200), st.integers(0, 150), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_neighbours_are_found_as_by_brute_force(rows: int, gone: int, k: int, seed: int) -> None:
    points = torch.randn(rows + 1, 5, generator=torch.Generator().manual_seed(seed))
    points[: rows // 2] = points[rows] + 1e-3 * points[: rows // 2]  # half of them very near
    found = DenseIndex(5, torch.device("cpu"))
    for point in points[:rows]:
        found.add(point)
    found.forget(min(gone, rows))
    distance, row = found.mean_distance(points[rows], k)
    kept = points[min(gone, rows) : rows]
    if len(kept) < k:
        assert (distance, row) == (float("inf"), -1)
        return
    truth = (kept.double() - points[rows].double()).norm(dim=1).sort()
    assert distance == pytest.approx(float(truth.values[:k].mean()), rel=1e-5, abs=1e-9)
    assert row == min(gone, rows) + int(truth.indices[0])


@given(
    st.integers(1, 300),
    st.integers(0, 200),
    st.integers(1, 20),
    st.floats(0, 4),
    st.integers(1, 20),
    st.integers(0, 2**32 - 1),
)
def test_within_is_decided_as_by_brute_force(
    rows: int, gone: int, k: int, within: float, dimensions: int, seed: int
) -> None:
    """Among near and far rows, forgotten ones too, with tiers of 8, 16, 32, ... rows."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(rows + 1, dimensions, generator=generator)
    points[::3] = points[rows] + 0.3 * points[::3]
    points += 100 * (seed % 2)  # far from the origin
    found = Small(dimensions, torch.device("cpu"))
    for point in points[:rows]:
        found.add(point)
    found.forget(min(gone, rows))
    kept = points[min(gone, rows) : rows]
    distance, row = found.mean_distance(points[rows], k, within=within)
    if len(kept) < k:
        assert (distance, row) == (float("inf"), -1)
        return
    truth = float((kept.double() - points[rows].double()).norm(dim=1).sort().values[:k].mean())
    assume(abs(truth - within) > 1e-4)
    assert (distance <= within) == (truth <= within)
    if distance <= within:
        assert distance >= truth - 1e-4
        assert min(gone, rows) <= row < rows


class Small(DenseIndex):
    """With tiers of few rows."""

    NEWEST = 8


def test_most_rows_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances taken for a stranger among 20,000 embeddings that lie near a subspace of ten dimensions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(10, 64, generator=generator)
    points = torch.randn(20_100, 10, generator=generator) @ basis
    found, taken = DenseIndex(64, torch.device("cpu")), []
    for point in points[:20_000]:
        found.add(point)
    original = DenseIndex._distances
    monkeypatch.setattr(
        DenseIndex, "_distances", lambda self, numbers, v: taken.append(len(numbers)) or original(self, numbers, v)
    )
    for point in points[20_000:]:
        assert found.mean_distance(point, 50, within=1.0) == (float("inf"), -1)
    assert sum(taken) / 100 < 2 * found.NEWEST + 200  # the newest twice, and a few of the others
