"""RayS: the order of its blocks, the optimum of a half-space to a percent, whole levels, and what a gate makes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.levels import dither, on_levels
from robustbox.attacks.rays import RayS, descend, turn_over, within
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Query
from tests.attacks.analytic import Flat, check_box, drive, refusing, task


def optimum(flat: Flat) -> float:
    """The linf distance of a Flat model's images from its plane."""
    return flat.distance / float(flat.normal.abs().sum())


def never(rows: Tensor) -> Tensor:
    return torch.zeros(len(rows)).long()


def always(rows: Tensor) -> Tensor:
    return torch.ones(len(rows)).long()


def test_blocks_are_halved_from_stage_to_stage_until_single_values_change_nothing() -> None:
    """Only all values up reach the goal, after that nothing: the flips of one direction, in the order of memory."""
    of = task(torch.full((1, 2, 3), 0.5), norm="linf", budget=200)

    def black(rows: Tensor) -> Tensor:
        return (rows.flatten(1) < 0.1).all(dim=1).long()

    _, asked = drive(RayS().search(of), of, black)
    assert of.remaining > 150
    up = [[k for k in range(6) if query.rows.flatten()[k] > 0.5] for query in asked if query.kind == "step"]
    singles = [[k] for k in range(6)]
    assert up == [[], [0, 1, 2], [3, 4, 5], [0, 1], [2, 3], [4, 5], *singles]


@pytest.mark.parametrize("case", ["plain", "stochastic", "refused", "knob"])
def test_single_values_are_repeated_while_that_may_change_something(case: str) -> None:
    """While a pass gains; where answers are random, where one was refused, and where the knob moves the blocks."""
    flat = Flat((3, 4, 4), 0.2)
    of = task(flat.images(1)[0], norm="linf", budget=1500, stochastic=case == "stochastic")
    refusals = {600} if case == "refused" else set()
    answers, search = refusing(flat, lambda number: number in refusals), RayS().search(of)
    query, reached = next(search), []
    with contextlib.suppress(StopIteration):
        while of.remaining:
            for knob in query.knobs if case == "knob" else ():
                knob.value = 1
            if query.kind == "step":
                reached.append(bool(flat(query.rows)))
            of.remaining -= 1
            query = search.send(answers(query.rows))
    if case in ("stochastic", "knob"):
        assert of.remaining == 0
        return
    assert of.remaining > 0
    assert not any(reached[-48:])
    assert any(reached[-96:-48])


def test_asked_once_it_ends_after_the_stage_of_single_values() -> None:
    """The same rows, and of single values one pass; what it returns is the row it had found."""

    def black(rows: Tensor) -> Tensor:
        return (rows.flatten(1) < 0.1).all(dim=1).long()

    of = task(torch.full((1, 2, 3), 0.5), norm="linf", budget=200)
    point, asked = drive(turn_over(of, RayS.tolerance, once=True), of, black)
    up = [[k for k in range(6) if query.rows.flatten()[k] > 0.5] for query in asked if query.kind == "step"]
    assert up == [[], [0, 1, 2], [3, 4, 5], [0, 1], [2, 3], [4, 5], *([k] for k in range(6))]
    assert point is not None
    assert bool(black(point))
    assert point.shape == (1, 1, 2, 3)


def test_where_no_flip_reaches_the_goal_signs_of_blocks_are_drawn() -> None:
    of = task(torch.full((1, 4, 4), 0.5), norm="linf", budget=7 + 8 + 16)
    _, asked = drive(RayS().search(of), of, never)
    signs = torch.cat([query.rows.flatten(1) for query in asked]).sub(0.5).sign()
    assert signs[:7].lt(0).sum(1).tolist() == [16, 8, 8, 4, 4, 4, 4]
    assert (signs[7:15, 0::2] == signs[7:15, 1::2]).all()
    assert (signs[15:, 0::2] != signs[15:, 1::2]).any()
    assert 0.35 <= signs[7:].lt(0).float().mean() <= 0.65
    assert len({tuple(row.tolist()) for row in signs[7:]}) > 18


FIGURES = [(0.2, (1.03, 1.01)), (0.6, (1.06, 1.01))]


@pytest.mark.parametrize(("far", "figures"), FIGURES)
def test_distance_over_the_optimum_of_a_half_space(far: float, figures: tuple[float, float]) -> None:
    flat = Flat((3, 8, 8), far)
    result = run_attack(flat, flat.images(4), [0] * 4, attack="rays", norm="linf", budget=5000)
    ratios = [float(np.median(result.distance_at(q))) / optimum(flat) for q in (1000, 5000)]
    assert (np.array(ratios) <= figures).all(), ratios
    assert (result.distance >= optimum(flat) * 0.999).all()
    assert flat.rows == sum(result.ledger.values())
    assert (result.queries < 5000).all()
    assert result.stop_reasons == ["finished"] * 4


@pytest.mark.parametrize("levels", [None, 256])
def test_it_succeeds_at_a_quarter_more_than_the_optimum(levels: int | None) -> None:
    flat = Flat((3, 8, 8), 0.9, levels)
    images = (flat.images(6) * 255).round() / 255
    beyond = 0.9 - ((images - 0.5) * flat.normal).sum(dim=(1, 2, 3))
    epsilon = 1.25 * float(beyond.max() / flat.normal.abs().sum())
    settings = {"attack": "rays", "norm": "linf", "epsilon": epsilon, "budget": 1000, "levels": levels}
    result = run_attack(flat, images, [0] * 6, **settings)  # type: ignore[arg-type]
    assert result.success.all()
    assert (result.distance <= epsilon + 1e-6).all()
    assert (result.queries == result.first_success).all()


def test_a_block_costs_a_row_and_an_improvement_two_logarithms_of_its_gain() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], norm="linf", budget=1000)
    _, asked = drive(RayS().search(of), of, flat)
    far = [float(distance(query.rows - of.image, "linf")) for query in asked]
    reached = [bool(flat(query.rows)) for query in asked]
    steps = [k for k, query in enumerate(asked) if query.kind == "step"]
    for k, after in zip(steps, [*steps[1:], len(asked)], strict=True):
        # Without success the next row is the next block's; with one, lines follow.
        assert (after == k + 1) or reached[k]
    best = math.inf
    for k, after in pairwise(steps):
        if reached[k] and best < math.inf:
            found = min(d for d, hit in zip(far[k:after], reached[k:after], strict=True) if hit)
            tolerance = best - far[k]
            assert after - k - 1 <= 2 * math.log2(1 + (best - found) / tolerance) + 2
        best = min([best, *(d for d, hit in zip(far[k:after], reached[k:after], strict=True) if hit)])
    assert len(steps) > 300


@pytest.mark.parametrize("least", [0.37, 0.999, 0.02])
def test_descend_finds_the_end_of_a_path(least: float) -> None:
    of = task(torch.zeros(1, 1, 1), norm="linf", budget=100)
    search = descend(of, lambda r: torch.full((1, 1, 1, 1), r), 1.0, 0.0, 0.001)
    found, asked = drive(search, of, lambda rows: (rows.flatten() >= least).long())
    assert found is not None
    assert least <= found <= least + 0.001
    assert len(asked) <= 2 * math.log2(1 + (1 - least) / 0.001) + 2


def test_rows_are_whole_levels_between_the_next_ones() -> None:
    image = torch.randint(60, 190, (3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    of = task(image, norm="linf", levels=256)
    signs = torch.randn(3, 32, 32, generator=of.generator).sign()
    thresholds = dither(of)
    for levels in (0.3, 5.5, 7.0):
        moved = (on_levels(of, signs * levels / 255, thresholds) - image) * 255 * signs
        assert torch.allclose(moved, moved.round(), atol=1e-3)
        assert set(moved.round().unique().tolist()) == {math.floor(levels), math.ceil(levels)}
        assert moved.mean().item() == pytest.approx(levels, abs=0.03)
    plain = task(image, norm="linf")
    assert dither(plain) is None
    assert torch.equal(on_levels(plain, signs * 0.01, None), (image + signs * 0.01).clamp(0, 1))
    assert within(task(image, norm="linf", epsilon=0.03, levels=256)) == 7 / 255
    assert within(task(image, norm="linf", epsilon=8 / 255, levels=256)) == 8 / 255
    assert within(task(image, norm="linf", epsilon=0.03)) == 0.03


def test_dithered_rows_gain_where_plain_rounding_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Flat((3, 8, 8), 0.9, 256)
    images = (flat.images(4) * 255).round() / 255
    settings = {"attack": "rays", "norm": "linf", "budget": 1000, "levels": 256}
    dithered = run_attack(flat, images, [0] * 4, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr("robustbox.attacks.rays.dither", lambda _: None)
    plain = run_attack(flat, images, [0] * 4, **settings)  # type: ignore[arg-type]
    assert np.median(dithered.distance) <= 0.75 * np.median(plain.distance)


def stand(search: object, answers: Callable[[Tensor], Tensor], rows: int) -> Query:
    """Drive a search and return its first step after so many rows."""
    query = next(search)  # type: ignore[call-overload]
    while rows > 0 or query.kind != "step":
        rows -= len(query.rows)
        query = search.send(Answer.of(answers(query.rows)))  # type: ignore[attr-defined]
    return query  # type: ignore[no-any-return]


def test_the_knob_sets_the_length_of_blocks_and_redraws_move_them() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], norm="linf")
    search = RayS().search(of)
    query = stand(search, flat, 200)
    (knob,) = query.knobs
    assert (knob.name, knob.integer, knob.low, knob.high) == ("block", True, 1, 96)
    base = knob.draw(1, 192)
    best = base.mode(dim=0).values  # each value is flipped in few of the rows
    lengths = {8, 20}
    for length in lengths:
        flipped = (knob.draw(length, 40) - best).flatten(1).abs() > 1e-6
        assert (flipped.sum(1) == length).all()
        places = flipped.float().argmax(1)
        assert (flipped.float() @ torch.arange(192.0) == (places * length + length * (length - 1) / 2)).all()
        assert places.unique().numel() > 15
    knob.value = 20
    assert query.redraw is not None
    fresh = query.redraw([0])
    assert ((fresh - best).flatten().abs() > 1e-6).sum() == 20
    # What was drawn again is what the answer is about: a success makes it the direction of the next rows.
    query = search.send(Answer.of(torch.ones(1).long()))
    assert query.kind == "line"
    assert torch.equal((query.rows - of.image).sign(), (fresh - of.image).sign())
    query = stand_from(search, query, flat)
    after = (knob.draw(1, 192)).mode(dim=0).values
    assert ((query.rows - after).flatten().abs() > 1e-6).sum() >= min(20, 192 - 172)


def stand_from(search: object, query: Query, answers: Callable[[Tensor], Tensor]) -> Query:
    while query.kind != "step":
        query = search.send(Answer.of(answers(query.rows)))  # type: ignore[attr-defined]
    return query


@pytest.mark.parametrize("refused", [5, 57, 58, 59, 60])
def test_a_refused_row_does_not_end_it(refused: int) -> None:
    flat = Flat((3, 8, 8), 0.2)
    asked = 0

    def answers(rows: Tensor) -> Answer:
        nonlocal asked
        asked += len(rows)
        if asked == refused:
            return Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8))
        return Answer.of(flat(rows))

    of = task(flat.images(1)[0], norm="linf", budget=1000)
    _, queries = drive(RayS().search(of), of, answers)
    best = min(float(distance(query.rows - of.image, "linf")) for query in queries if flat(query.rows))
    assert best <= 1.1 * optimum(flat)


def test_where_answers_are_stochastic_the_best_point_is_asked_again_before_each_block() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], norm="linf", stochastic=True)
    search = RayS().search(of)
    query = stand(search, flat, 200)
    for lucky in range(3):
        far = float(distance(query.rows - of.image, "linf"))
        query = search.send(Answer.of(torch.zeros(1).long()))
        held = float(distance(query.rows - of.image, "linf"))
        assert query.kind == "line"
        assert far < held < 1.02 * far
        for _ in range(lucky):  # it fails: further out, by 1/32, then 1/16
            query = search.send(Answer.of(torch.zeros(1).long()))
            assert query.kind == "line"
        outward = held * (1 + (0, 1 / 32, 1 / 16)[lucky])
        assert float(distance(query.rows - of.image, "linf")) == pytest.approx(outward, rel=1e-3)
        query = search.send(Answer.of(torch.ones(1).long()))
        assert query.kind == "step"
        assert float(distance(query.rows - of.image, "linf")) == pytest.approx(outward * far / held, rel=1e-2)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_lucky_answer_to_the_image_itself_does_not_end_it(value: int) -> None:
    """Rounded or clipped, a point of a ray may be the image: where it fails, the search stands further out."""
    image, lucky = torch.full((3, 4, 4), value / 255), False
    of = task(image, norm="linf", levels=256, budget=600, stochastic=True)

    def answers(rows: Tensor) -> Tensor:
        nonlocal lucky
        far = (rows - image).flatten(1).abs().amax(1)
        yes = far > 0.1 if lucky else far >= 0
        lucky |= bool((far == 0).any())
        return yes.long()

    _, queries = drive(RayS().search(of), of, answers)
    distances = [float(distance(query.rows - image, "linf")) for query in queries]
    assert lucky
    assert of.remaining == 0
    assert 0.1 < max(distances[-5:]) < 0.15


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("answers", [never, always])
def test_degenerate_images_and_models(answers: Callable[[Tensor], Tensor], levels: int | None, value: float) -> None:
    def model(rows: Tensor) -> Tensor:
        check_box(rows)
        return answers(rows) * (rows - value).abs().flatten(1).amax(1).gt(0.003)  # at the image itself, class 0

    images = torch.full((2, 3, 4, 4), value)
    for budget in (1, 7, 200):
        result = run_attack(model, images, [0, 0], attack="rays", norm="linf", budget=budget, levels=levels)
        assert result.errors == [None, None]
        assert (result.queries <= budget).all()
        if answers is never:
            assert (result.queries == budget).all()


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_bad_options_are_refused_in_one_line(tolerance: float) -> None:
    with pytest.raises(InputError, match=rf"^tolerance must be between 0 and 1, got {tolerance}$"):
        RayS(tolerance=tolerance)
