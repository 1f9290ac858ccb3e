"""The race: searches are asked in turns, the one that is ahead goes on, and what the others asked is bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.race import EARLY, LATE, LEAD, TURN, Start, race
from robustbox.protocol import Answer, Knob, Query
from tests.attacks.analytic import drive, task

IMAGE = torch.full((1, 2, 2), 0.5)


def runner(far: list[float], asked: list[Query]) -> Start:
    """A search that asks rows at these distances, one a query, and returns the last."""
    knob = Knob("block", 1, 4, lambda value, n: IMAGE.expand(n, 1, 2, 2))
    query = Query(IMAGE[None], knobs=(knob,))
    for distance in far:
        query = replace(query, rows=(IMAGE + distance)[None])
        asked.append(query)
        yield query
    return query.rows if far else None


def run(*far: list[float], reach: float = 1.0) -> tuple[tuple[int, Tensor] | None, list[int]]:
    """What a race returns where all rows up to a distance reach the goal, and how many rows each search asked."""
    of = task(IMAGE, "linf")
    books: list[list[Query]] = [[] for _ in far]

    def inside(rows: Tensor) -> Tensor:
        return ((rows - IMAGE).flatten(1).abs().amax(1) <= reach + 1e-6).long()

    won, asked = drive(race(of, [runner(each, book) for each, book in zip(far, books, strict=True)]), of, inside)
    assert len(asked) == sum(map(len, books))
    return won, [len(book) for book in books]


def test_the_nearest_after_the_last_turn_goes_on() -> None:
    won, rows = run([0.2] * 100, [0.19] * 100)
    assert won is not None
    assert won[0] == 1
    assert rows == [LATE, 100]


def test_one_that_is_far_behind_is_dropped_early() -> None:
    won, rows = run([0.4] * 100, [0.39 / LEAD] * 100)
    assert won is not None
    assert won[0] == 1
    assert rows == [EARLY, 100]


def test_one_that_has_not_reached_the_goal_is_not_dropped_early() -> None:
    won, rows = run([0.4] * 20 + [0.01] * 80, [0.2] * 100, reach=0.3)
    assert won is not None
    assert won[0] == 0
    assert rows == [100, 25]  # then that one is


def test_one_that_ends_keeps_its_place() -> None:
    won, rows = run([0.1] * 7, [0.2] * 100)
    assert won is not None
    assert won[0] == 0
    assert float((won[1] - IMAGE).abs().max()) == pytest.approx(0.1)
    assert rows == [7, LATE]


def test_nothing_found_is_none() -> None:
    won, rows = run([0.4] * 100, [0.45] * 100, reach=0.3)
    assert won is None
    assert rows == [LATE, LATE]


def test_knobs_of_a_start_are_left_out() -> None:
    of = task(IMAGE, "linf")
    asked: list[Query] = []
    search = race(of, [runner([0.1] * TURN, asked)])
    query = next(search)
    assert asked[0].knobs
    assert query.knobs == ()
    assert torch.equal(query.rows, asked[0].rows)


def test_a_row_that_was_drawn_again_counts_where_it_then_was() -> None:
    """A wrapper draws a refused row again: what reached the goal is the later row."""

    def further(asked: list[int]) -> Start:
        row = (IMAGE + 0.2)[None]
        while len(asked) < 2 * LATE:
            asked.append(1)
            yield Query(row, redraw=lambda positions: (IMAGE + 0.4).expand(len(positions), 1, 2, 2))
        return row

    redrawn: list[int] = []
    plain: list[Query] = []
    search = race(task(IMAGE, "linf"), [further(redrawn), runner([0.3] * 2 * LATE, plain)])
    query = next(search)
    with pytest.raises(StopIteration) as end:
        while True:
            if query.redraw is not None:
                query.redraw([0])
            query = search.send(Answer.of(torch.ones(1, dtype=torch.long)))
    assert end.value.value[0] == 1
    assert len(redrawn) == LATE


class Bright(torch.nn.Module):
    """Weak to brightness: no wave reaches its boundary."""

    def forward(self, rows: Tensor) -> Tensor:
        level = rows.flatten(1).mean(1)
        return torch.stack([torch.full_like(level, 0.55), level], 1)


class Rough(torch.nn.Module):
    """Weak to all that differs from pixel to pixel: plain areas hardly reach its boundary."""

    def forward(self, rows: Tensor) -> Tensor:
        level = (rows[..., 1:] - rows[..., :-1]).flatten(1).abs().mean(1)
        return torch.stack([torch.full_like(level, 0.05), level], 1)


@pytest.mark.parametrize(("model", "least"), [(Bright(), 0.05), (Rough(), 0.05 / 2)])
def test_in_linf_it_finds_what_a_network_is_weak_to(model: torch.nn.Module, least: float) -> None:
    result = run_attack(model, torch.full((4, 3, 32, 32), 0.5), [0] * 4, "waterfill", "linf", budget=150)
    assert all(far < 1.5 * least for far in result.distance_at(150)), result.distance_at(150)


def test_the_rows_of_a_run_are_the_same_again() -> None:
    runs = [run_attack(Rough(), torch.full((2, 3, 16, 16), 0.5), [0, 0], "waterfill", "linf", budget=90) for _ in "ab"]
    assert runs[0].traces == runs[1].traces


def test_a_start_that_asks_nothing_loses() -> None:
    won, rows = run([], [0.1] * 40)
    assert won is not None
    assert won[0] == 1
    assert rows == [0, 40]
