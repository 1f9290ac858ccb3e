"""Memories that forget: they decide as a list of all rows does, take memory for what is remembered, and say how much."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaincc

from robustbox.defenses import index, table
from robustbox.defenses.blacklight import SketchMemory
from robustbox.defenses.encoders import KnnMemory
from robustbox.defenses.gwad import StepMemory
from robustbox.defenses.memory import Memory, Verdict
from robustbox.defenses.neighbours import DenseIndex
from robustbox.defenses.piha import CodeMemory
from robustbox.defenses.qpa import Family, FamilyMemory, unrelated

Stream = list[tuple[Any, int]]
HERE = torch.device("cpu")
SETS = st.frozensets(st.integers(-6, 30), max_size=8).map(lambda row: np.array(sorted(row), dtype=np.int64))
STRINGS = st.lists(st.integers(0, 2), min_size=7, max_size=7).map(lambda row: np.array(row, dtype=np.uint8))
POINTS = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda row: torch.tensor(row).float())


def streams(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[Stream]:
    """Rows, and how many are remembered after each: always one number, as behind a window, or all, and now and then few."""
    window = st.integers(1, 40).flatmap(lambda size: st.lists(st.tuples(rows, st.just(size)), max_size=120))
    turn = st.tuples(st.lists(rows, min_size=1, max_size=25), st.integers(0, 25))
    turns = st.lists(turn, max_size=6).map(
        lambda parts: [(row, few if k == len(part) else 1000) for part, few in parts for k, row in enumerate(part, 1)]
    )
    return window | turns


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    """Tables of 4 slots and tiers of 4 or 8 rows, so that 120 rows pass through several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "LEAST", 4)
        patch.setattr(index, "FRESH", 4)
        patch.setattr(DenseIndex, "NEWEST", 8)
        yield


def told(memory: Memory, stream: Stream) -> Iterator[tuple[list[Any], int, Any, Verdict]]:
    """For each row: all rows before it, the number of the oldest that is remembered, the row and what is said of it."""
    kept_from = 0
    for number, (row, size) in enumerate(stream):
        verdict = memory.judge(row)
        yield [earlier for earlier, _ in stream[:number]], kept_from, row, verdict
        assert memory.store(row, verdict) == number
        kept_from = max(kept_from, number + 1 - size)
        memory.forget(kept_from)
        assert memory.stored == number + 1 - kept_from


def shares(rows: Sequence[Any], kept_from: int, row: Any) -> list[int]:
    """How many tokens each row shares with one; 0 where it is forgotten."""
    return [len({*row.tolist()} & {*other.tolist()}) * (k >= kept_from) for k, other in enumerate(rows)]


@given(streams(SETS), st.integers(1, 6))
def test_sketches(stream: Stream, least: int) -> None:
    for rows, kept_from, row, verdict in told(SketchMemory(least), stream):
        counts = shares(rows, kept_from, row)
        most = max(counts, default=0)
        assert verdict.hit is (most >= least)
        if verdict.hit:  # by the newest that suffice
            assert counts[verdict.match] == verdict.likeness >= least
        else:
            assert (verdict.match, verdict.likeness) == (counts.index(most) if most else -1, most)


@given(streams(SETS), st.sampled_from([0.01, 0.5]), st.integers(2, 4))
def test_families(stream: Stream, link: float, smallest: int) -> None:
    families: list[Family] = []  # by row number; none is ever dropped
    for rows, kept_from, row, verdict in told(FamilyMemory(link, 0.2, smallest), stream):
        counts, stored = shares(rows, kept_from, row), len(rows) - kept_from
        most = max(counts, default=0)
        match, family = counts.index(most) if most else -1, Family()
        chance = min(1.0, stored * unrelated(most))
        if most and chance <= link:
            family = families[match]
            family.queries += 1
            family.evidence -= math.log(chance)
            improbable = gammaincc(family.queries - 1, family.evidence) <= 0.2 / stored
            family.alert |= family.queries >= smallest and bool(improbable)
        families.append(family)
        assert verdict == Verdict(family.alert, match, most)


@given(streams(STRINGS), st.sampled_from([0.0, 0.15, 0.3]))
def test_strings(stream: Stream, threshold: float) -> None:
    for rows, kept_from, row, verdict in told(CodeMemory(threshold), stream):
        near = [k for k, other in enumerate(rows) if k >= kept_from and (other != row).sum() <= threshold * 7]
        assert verdict.hit is bool(near)
        assert verdict.match in (near or [-1])


@given(streams(POINTS), st.integers(1, 12), st.sampled_from([0.0, 1.0, 1.3, 3.3]))
def test_embeddings(stream: Stream, k: int, threshold: float) -> None:
    """Threshold 0 too, where k repeats are a hit however old they are."""
    for rows, kept_from, row, verdict in told(KnnMemory(2, HERE, k, threshold), stream):
        kept = [*range(kept_from, len(rows))]
        gaps = [float((rows[number] - row).norm()) for number in kept]
        assert verdict.hit is (len(kept) >= k and bool(np.mean(sorted(gaps)[:k]) <= threshold))
        if verdict.hit:  # by the newest where these suffice
            newest = max(8, k)
            late = np.mean(sorted(gaps[-newest:])[:k]) <= threshold
            part = gaps[-newest:] if late else gaps
            assert verdict.match == kept[len(gaps) - len(part) + part.index(min(part))]


def test_steps_are_remembered_whatever_the_window() -> None:
    """GWAD keeps its last `length` cosines and two thumbnails, and nothing of a row's own."""
    memory, other = StepMemory(8, 0.2), StepMemory(8, 0.2)
    verdicts = []
    for number in range(40):
        row = DRAWS.normal(size=5).astype(np.float32) * 0.1 ** (number % 20 < 10)
        verdicts.append(memory.judge(row))
        assert other.judge(row) == verdicts[-1]
        assert memory.store(row, verdicts[-1]) == other.store(row, verdicts[-1])
        memory.forget(number)
    assert {verdict.hit for verdict in verdicts} == {True, False}
    assert memory.stored == other.stored == 10


DRAWS = np.random.default_rng(0)
CASES: dict[str, tuple[Callable[[], Memory], Callable[[], Any]]] = {
    "sketches": (lambda: SketchMemory(26), lambda: DRAWS.integers(2**62, size=20)),
    "families": (lambda: FamilyMemory(0.01, 0.01, 3), lambda: DRAWS.integers(2**62, size=20)),
    "strings": (lambda: CodeMemory(0.05), lambda: DRAWS.integers(256, size=400, dtype=np.uint8)),
    "embeddings": (lambda: KnnMemory(64, HERE, 5, 0.7), lambda: torch.from_numpy(DRAWS.random(64))),
    "steps": (lambda: StepMemory(50, 0.2), lambda: DRAWS.random(300, dtype=np.float32)),
}


def filled(case: str, rows: int, window: int) -> Iterator[Memory]:
    """A memory after each of its rows."""
    build, draw = CASES[case]
    memory = build()
    for number in range(rows):
        memory.store(draw(), Verdict(False, -1))
        memory.forget(number + 1 - window)
        yield memory


@pytest.mark.parametrize("case", CASES)
def test_memory_is_bounded_by_the_window(case: str) -> None:
    """Of 2,000 rows 100 are remembered: never more bytes than 400 rows take where none is forgotten."""
    *_, plain = filled(case, 400, 400)
    sizes = [memory.nbytes for number, memory in enumerate(filled(case, 2000, 100)) if number % 5 == 0]
    assert max(sizes) <= plain.nbytes
    assert max(sizes[200:]) <= 1.05 * max(sizes[:200])  # and as many after 2,000 rows as after 1,000


@pytest.mark.parametrize("case", ["sketches", "families", "strings", "steps"])
@pytest.mark.parametrize("window", [100, 600])
def test_nbytes_is_what_is_allocated(case: str, window: int) -> None:
    tracemalloc.start()
    try:
        *_, memory = filled(case, 600, window)
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert memory.nbytes == pytest.approx(allocated, rel=0.1, abs=8000)


@pytest.mark.parametrize("window", [100, 600])
def test_nbytes_of_an_index_of_embeddings_is_what_its_tensors_hold(window: int) -> None:
    found = DenseIndex(64, HERE)
    for number in range(600):
        found.add(torch.from_numpy(DRAWS.random(64)))
        found.forget(number + 1 - window)
    parts = [found._table._slots, *(found._projection or ())]
    parts += [getattr(tier, name) for tier in found._tiers for name in ("numbers", "points", "first", "squares")]
    assert found.nbytes == sum(part.untyped_storage().nbytes() for part in parts)
