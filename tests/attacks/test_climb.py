"""The step of random searches on scores: what is kept, what is drawn again, what is compared where answers are stochastic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbox.attacks.climb import Climb
from robustbox.protocol import Knob, Query

from .analytic import task
from .slopes import Script

IMAGE = torch.full((1, 2, 2), 0.5)


def row(value: float) -> Tensor:
    return torch.full((1, 1, 2, 2), value)


def play(generator: Any, box: Script, again: int = 0) -> tuple[bool, Query]:
    """Answers the one query of a sub-generator, having its rows drawn again so many times."""
    query: Query = next(generator)
    rows = query.rows
    for _ in range(again):
        assert query.redraw is not None
        rows = query.redraw([*range(len(rows))])
    with pytest.raises(StopIteration) as done:
        generator.send(box(rows))
    return done.value.value, query


def test_a_lower_loss_takes_the_place_and_an_equal_one_does_not() -> None:
    climb = Climb(task(IMAGE), "margin")
    box = Script([1.0, 1.0, 0.5, 0.7])
    assert play(climb.start(row(0.1)), box)[0]
    for value, won, stands in ((0.2, False, 0.1), (0.3, True, 0.3), (0.4, False, 0.3)):
        assert play(climb.challenge(row(value)), box)[0] == won
        assert climb.row.equal(row(stands))
    assert climb.value == pytest.approx(1.0)  # the margin of logits (0.5, -0.5)


@pytest.mark.parametrize("stochastic", [False, True])
def test_rows_drawn_again_take_the_place_of_what_was_asked(stochastic: bool) -> None:
    climb = Climb(task(IMAGE, stochastic=stochastic), "margin", (Knob("size", 1, 2, lambda value, n: row(0.0)),))
    fresh = iter([0.2, 0.3, 0.7, 0.8])
    box = Script([1.0, 0.5, 1.0])
    _, query = play(climb.start(row(0.1), lambda: row(next(fresh))), box, again=2)
    assert (query.kind, query.knobs) == ("init", ())
    assert climb.row.equal(row(0.3))
    won, query = play(climb.challenge(row(0.6), lambda: row(next(fresh))), box, again=2)
    assert won
    assert (query.kind, len(query.knobs), len(query.rows)) == ("step", 1, 1 + stochastic)
    assert climb.row.equal(row(0.8))
    assert query.rows[0].equal(row(0.6)[0])  # what was sent stays as it was
    if stochastic:
        assert box.asked[-1].equal(row(0.3)[0])  # the incumbent is not random


def test_rows_that_are_not_random_are_not_drawn_again() -> None:
    climb = Climb(task(IMAGE), "margin")
    assert next(climb.start(row(0.1))).redraw is None
    assert next(climb.challenge(row(0.1))).redraw is None


@pytest.mark.parametrize("spoil", [math.nan, -99.0])
def test_a_refused_row_changes_nothing(spoil: float) -> None:
    climb = Climb(task(IMAGE), "margin")
    box = Script([1.0, 0.9, 0.8], {0, 2}, spoil)
    assert not play(climb.start(row(0.1)), box)[0]
    assert climb.value == math.inf
    assert play(climb.challenge(row(0.2)), box)[0]
    assert not play(climb.challenge(row(0.3)), box)[0]
    assert climb.row.equal(row(0.2))
    assert not climb.reached


def test_a_lucky_draw_does_not_freeze_the_search() -> None:
    climb = Climb(task(IMAGE, stochastic=True), "margin")
    #            lucky start | worse than the start was, better than it is | incumbent refused: its last value counts
    box = Script([-5.0, 0.5, 1.0, 0.7, 0.0], {4})
    play(climb.start(row(0.1)), box)
    assert climb.reached
    assert play(climb.challenge(row(0.2)), box)[0]
    assert not climb.reached  # the incumbent of then failed when asked again
    assert not play(climb.challenge(row(0.3)), box)[0]
    assert climb.row.equal(row(0.2))
