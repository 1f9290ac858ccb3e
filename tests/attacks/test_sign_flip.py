"""Sign Flip: the geometry of its two moves, how they adapt, the optimum of a half-space, and what a gate makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.sign_flip import SignFlip
from robustbox.attacks.starts import find_start
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Query, Task
from tests.attacks.analytic import Flat, check_box, drive, refusing, task

YES, NO = Answer.of(torch.tensor([1])), Answer.of(torch.tensor([0]))
REFUSED = Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8))


def optimum(flat: Flat) -> float:
    """The linf distance of a Flat model's images from its plane."""
    return flat.distance / float(flat.normal.abs().sum())


def started(attack: SignFlip, of: Task, answers: Callable[[Tensor], Tensor]) -> tuple[Any, Query]:
    """A search whose start is found, and its first move."""
    search = attack.search(of)
    query = next(search)
    while query.kind != "step":
        query = search.send(Answer.of(answers(query.rows)))
    return search, query


def test_the_start_and_ten_halvings_come_first_then_two_rows_an_iteration() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], norm="linf", budget=500)
    _, asked = drive(SignFlip().search(of), of, flat)
    again = task(of.image, norm="linf", budget=500)
    _, start = drive(find_start(again), again, flat)
    kinds = [query.kind for query in asked]
    assert kinds == [query.kind for query in start] + ["line"] * 10 + ["step"] * (len(asked) - len(start) - 10)
    # The halvings clip the start, they do not shrink it.
    far = float(distance(asked[len(start)].rows - of.image, "linf"))
    moved = (asked[len(start)].rows - of.image).abs()
    assert (moved > far - 1e-6).sum() > 1


def test_a_projection_is_shorter_by_alpha_and_a_flip_turns_signs() -> None:
    flat = Flat((3, 8, 8), 0.2)
    search, query = started(SignFlip(), of := task(flat.images(1)[0], norm="linf"), flat)
    limit = float(distance(query.rows - of.image, "linf")) + 0.004
    before = None
    for _ in range(9):
        projected = (query.rows - of.image)[0]
        assert float(projected.abs().max()) == pytest.approx(limit - 0.004, abs=1e-6)
        if before is not None:  # alpha up or down on every value that the shorter limit does not hold back
            free = (projected.abs() < limit - 0.004 - 1e-6) & (before.abs() < limit - 0.004)
            assert torch.allclose((projected - before)[free].abs(), torch.tensor(0.004), atol=1e-6)
        limit -= 0.004
        query = search.send(YES)
        flipped = (query.rows - of.image)[0]
        assert torch.allclose(flipped.abs(), projected.abs(), atol=1e-6)
        before = projected
        query = search.send(NO)


def after(answers: tuple[Answer, Answer], iterations: int) -> tuple[float, float]:
    """alpha and the share of flipped signs after so many iterations in which all moves were answered alike."""
    image = torch.full((1, 64, 64), 0.5)
    search, query = started(SignFlip(), of := task(image, norm="linf"), lambda rows: torch.ones(len(rows)).long())
    points: list[Tensor] = []
    for _ in range(iterations):
        points.append(query.rows - of.image)
        query = search.send(answers[0])
        query = search.send(answers[1])
    limit = float(distance(points[0], "linf"))
    shorter = limit - float(distance(query.rows - of.image, "linf"))
    signs = search.gi_frame.f_locals["moves"]._stay.mean()
    return shorter, float(1 - signs)


def test_moves_grow_where_they_are_kept_and_shrink_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(of: Task, *_: Any) -> Any:
        yield Query(torch.ones_like(of.image)[None], "init")
        return torch.ones_like(of.image)[None]

    monkeypatch.setattr("robustbox.attacks.sign_flip.find_start", fixed)
    monkeypatch.setattr("robustbox.attacks.sign_flip.HALVINGS", 0)
    # Not kept: the limit stays, alpha falls from 0.004 by 1.5 every ten iterations, p rises to its maximum.
    shorter, flips = after((NO, NO), 20)
    assert shorter == pytest.approx(0.004 / 1.5**2 - 0.004, abs=1e-6)
    assert flips == pytest.approx(1e-4, abs=1e-6)
    # Kept: ten steps of 0.004, ten of 0.006, and one of 0.009 where alpha was 0.004 at the start.
    shorter, flips = after((YES, NO), 20)
    assert shorter == pytest.approx(0.1 + 0.009 - 0.004, abs=1e-6)
    # Refused moves are not kept, but count as if they were: they go further next time.
    shorter, flips = after((REFUSED, REFUSED), 20)
    assert shorter == pytest.approx(0.004 * 1.5**2 - 0.004, abs=1e-6)
    assert flips == pytest.approx(3e-3, abs=1e-6)
    # Kept flips: 0.001 an adaptation, and 0.0001 each in the direction of what was not flipped, up to 0.01.
    assert after((NO, YES), 10)[1] == pytest.approx(3e-3, abs=2e-4)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_flip_turns_at_least_one_value(factor: float) -> None:
    """With p = 0.999 most flips of 64 values would turn none, and ask for what was asked."""
    of = task(torch.full((1, 8, 8), 0.5), norm="linf", budget=400)
    _, asked = drive(SignFlip(factor=factor).search(of), of, lambda rows: (rows[:, 0, 0, 0] > 0.6).long())
    steps = torch.cat([query.rows for query in asked if query.kind == "step"])
    assert len(steps) > 300
    assert len(steps.unique(dim=0)) >= 0.95 * len(steps)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_knobs_draw_from_the_moves_and_redrawn_rows_are_what_is_kept(factor: float) -> None:
    flat = Flat((3, 8, 8), 0.2)
    search, query = started(SignFlip(factor=factor), of := task(flat.images(1)[0], norm="linf"), flat)
    limit = float(distance(query.rows - of.image, "linf")) + 0.004
    (step,) = query.knobs
    for alpha in (0.001, 0.01):
        rows = step.draw(alpha, 30)
        assert distance(rows - of.image, "linf").tolist() == pytest.approx([limit - alpha] * 30, abs=1e-6)
        assert rows.unique(dim=0).shape[0] == 30
    step.value = 0.01
    assert query.redraw is not None
    fresh = query.redraw([0])
    assert float(distance(fresh - of.image, "linf")) == pytest.approx(limit - 0.01, abs=1e-6)
    query = search.send(YES)
    (turns,) = query.knobs
    cells = of.image.numel() / factor**2
    assert (turns.name, turns.low, turns.high, turns.integer) == ("flips", 1, cells / 4, True)
    kept = (fresh - of.image).flatten()
    for count in (2, 12):
        turned = ((turns.draw(count, 400) - of.image).flatten(1) * kept).lt(0).float().sum(1)
        assert turned.mean().item() == pytest.approx(count * factor**2, rel=0.35 if factor > 1 else 0.1)
    turns.value = 12
    assert query.redraw is not None
    flipped = (query.redraw([0]) - of.image).flatten()
    assert torch.allclose(flipped.abs(), kept.abs(), atol=1e-6)
    query = search.send(YES)
    step.value = 1e-4  # nearly where it stands: the signs are those of the redrawn flip
    assert query.redraw is not None
    now = (query.redraw([0]) - of.image).flatten()
    large = flipped.abs() > 0.011
    assert torch.equal(now.sign()[large], flipped.sign()[large])


FIGURES = [(False, (1.45, 1.25)), (True, (1.55, 1.45))]


@pytest.mark.parametrize(("targeted", "figures"), FIGURES)
def test_distance_over_the_optimum_of_a_half_space(targeted: bool, figures: tuple[float, float]) -> None:
    flat = Flat((3, 8, 8), 0.5)
    noise = 0.3 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    pool = ((flat.images(6) + noise + 3 * flat.normal).clamp(0, 1), [1] * 6)
    aim: dict[str, Any] = {"targets": 1, "pool": pool} if targeted else {}
    result = run_attack(flat, flat.images(2), [0] * 2, attack="sign-flip", norm="linf", budget=2000, **aim)
    ratios = [float(np.median(result.distance_at(q))) / optimum(flat) for q in (1000, 2000)]
    assert (np.array(ratios) <= figures).all(), ratios
    assert (result.distance >= optimum(flat) * 0.999).all()
    assert flat.rows == sum(result.ledger.values())
    assert (result.queries == 2000).all()
    assert flat(result.adversarials).all()


@pytest.mark.parametrize("levels", [None, 256])
def test_it_succeeds_at_a_quarter_more_than_the_optimum(levels: int | None) -> None:
    flat = Flat((3, 8, 8), 0.5, levels)
    images = (flat.images(2) * 255).round() / 255
    beyond = 0.5 - ((images - 0.5) * flat.normal).sum(dim=(1, 2, 3))
    epsilon = 1.25 * float(beyond.max() / flat.normal.abs().sum())
    settings: dict[str, Any] = {"norm": "linf", "epsilon": epsilon, "budget": 5000, "levels": levels}
    result = run_attack(flat, images, [0] * 2, attack="sign-flip", **settings)
    assert result.success.all()
    assert (result.distance <= epsilon + 1e-6).all()


@pytest.mark.parametrize("refused", [1, 9, 57, 58, 59, 60])
def test_a_refused_row_does_not_end_it(refused: int) -> None:
    flat = Flat((3, 8, 8), 0.2)
    answers = refusing(flat, lambda number: number == refused - 1)
    of = task(flat.images(1)[0], norm="linf", budget=1500)
    _, queries = drive(SignFlip().search(of), of, answers)
    rows = torch.cat([query.rows for query in queries])
    assert float(distance(rows[flat(rows) == 1] - of.image, "linf").min()) <= 2.0 * optimum(flat)


def test_a_lucky_answer_does_not_freeze_it() -> None:
    flat = Flat((3, 8, 8), 0.2)
    noise = torch.Generator().manual_seed(5)

    def answers(rows: Tensor) -> Tensor:
        return flat(rows) ^ (torch.rand(len(rows), generator=noise) < 0.2).long()

    def last(stochastic: bool) -> float:
        of = task(flat.images(1)[0], norm="linf", budget=3000, stochastic=stochastic)
        _, queries = drive(SignFlip().search(of), of, answers)
        final = torch.cat([query.rows for query in queries if query.kind == "step"][-100:])
        return float(distance(final - of.image, "linf").median())

    assert last(False) < 0.5 * optimum(flat)  # lost in the clean side
    assert last(True) > 0.7 * optimum(flat)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("label", [0, 1])
def test_degenerate_images_and_models(label: int, levels: int | None, value: float) -> None:
    def model(rows: Tensor) -> Tensor:
        check_box(rows)
        return label * (rows - value).abs().flatten(1).amax(1).gt(0.003).long()  # at the image itself, class 0

    images = torch.full((2, 3, 4, 4), value)
    for budget in (1, 7, 200):
        result = run_attack(model, images, [0, 0], attack="sign-flip", norm="linf", budget=budget, levels=levels)
        assert result.errors == [None, None]
        assert (result.queries <= budget).all()


def test_bad_options_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^factor must be at least 1, got 0.5$"):
        SignFlip(factor=0.5)
    assert math.isclose(SignFlip(factor=4).factor, 4)
