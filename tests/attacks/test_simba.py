"""SimBA: the paper's steps and guarantee, exact on linear losses; the second sign only where the first fails."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.simba import Directions, SimBA
from robustbox.attacks.subspaces import dct_matrix
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Norm, Query, Task

from .analytic import drive, task
from .slopes import Script, Slope, degenerate, flat_scores, three_bands

EPSILON: dict[Norm, float] = {"linf": 0.05, "l2": 0.7}
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
BASES: Any = pytest.mark.parametrize("basis", ["pixel", "dct"])
SHAPE = (2, 4, 6)


def grey(shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.4 + 0.3


def asked(attack: SimBA, of: Task, box: Any = None) -> list[Query]:
    _, queries = drive(attack.search(of), of, box or Script())
    return queries


# The basis.


@BASES
@pytest.mark.parametrize("factor", [None, 1.0, 2.0, 100.0])
def test_a_pass_takes_every_direction_of_an_orthonormal_basis_once(basis: Any, factor: float | None) -> None:
    directions = Directions(task(grey()), basis, factor)
    passes = [torch.cat([directions.next() for _ in range(48)]).flatten(1) for _ in range(2)]
    for each in passes:
        assert torch.allclose(each @ each.T, torch.eye(48), atol=1e-5)
    assert not passes[0].equal(passes[1])


def test_pixels_are_single_values() -> None:
    directions = Directions(task(grey()), "pixel", None)
    for _ in range(20):
        assert directions.next().flatten().sort().values.tolist() == [0.0] * 47 + [1.0]


def test_frequencies_come_block_by_block_from_the_lowest() -> None:
    """The paper's order: the lowest eighth along each side, then frames of a quarter of that."""
    shape = (1, 64, 64)
    directions = Directions(task(torch.full(shape, 0.5)), "dct", None)
    matrix = dct_matrix(64, torch.device("cpu"))
    seen = []
    for _ in range(64 + 36 + 44):
        spectrum = matrix @ directions.next()[0, 0] @ matrix.T
        place = int(spectrum.abs().argmax())
        assert spectrum.flatten()[place] == pytest.approx(1, abs=1e-4)
        seen.append((place // 64, place % 64))
    for count, side in ((64, 8), (100, 10), (144, 12)):
        assert sorted(seen[:count]) == [(i, j) for i in range(side) for j in range(side)]
    assert seen[:64] != sorted(seen[:64])


# The search.


@BASES
def test_on_a_linear_loss_steps_length_and_queries_are_those_of_the_paper(basis: Any) -> None:
    """Every direction is taken with the right sign, in the order drawn, until the sum of gains reaches the plane."""
    slope, step = Slope((3, 8, 8), 0.5), 0.1
    of = task(slope.images(1)[0], budget=400)
    attack = SimBA(basis=basis, step=step)
    queries = asked(attack, of, slope.answer)
    margins = [float(slope(query.rows)[0, 1]) for query in queries]
    steps = next(k for k, margin in enumerate(margins) if margin > 0)
    order = Directions(task(of.image), basis, None)
    gains = [float(order.next().flatten().double() @ slope.normal.flatten().double()) for _ in range(192)]
    cost, taken, best = 1, 0, -0.5
    for gain in gains:
        taken, cost, best = taken + 1, cost + (1 if gain > 0 else 2), best + step * abs(gain)
        if best > 0:
            break
    assert steps + 1 == cost
    delta = queries[steps].rows - of.image
    assert float(delta.norm()) == pytest.approx(step * math.sqrt(taken), rel=1e-4)


@BASES
def test_without_epsilon_halving_the_step_comes_near_to_the_optimum(basis: Any) -> None:
    slope = Slope((3, 8, 8), 0.5)
    options = {"basis": basis}
    result = run_attack(slope, slope.images(3), [0] * 3, "simba", "l2", budget=1500, attack_options=options)
    assert np.median(result.distance) <= 1.35 * slope.optimum("l2")  # all values moved alike: sqrt(pi / 2)
    assert (result.distance >= slope.optimum("l2")).all()


def test_without_epsilon_tries_start_from_the_image_at_half_the_step() -> None:
    image = grey((1, 4, 4))
    fails, wins = [1.0], [0.5, 0.2, -0.1]  # the image, then three steps to the first success
    queries = asked(SimBA(basis="pixel"), task(image, budget=8), Script([*fails, *wins, *wins, 0.9]))
    lengths = [float((query.rows - image).norm()) for query in queries]
    assert lengths == pytest.approx(
        [0, 0.2, 0.2 * 2**0.5, 0.2 * 3**0.5, 0.1, 0.1 * 2**0.5, 0.1 * 3**0.5, 0.05], rel=1e-4
    )


@pytest.mark.parametrize(("levels", "tries"), [(None, 8), (256, 6)])
def test_without_epsilon_it_ends_where_steps_become_invisible(levels: int | None, tries: int) -> None:
    of = task(grey(), budget=500, levels=levels)
    queries = asked(SimBA(basis="pixel"), of, Script([1.0, *[-1.0] * 499]))
    assert len(queries) == 1 + tries
    assert of.remaining > 0


@pytest.mark.parametrize("epsilon", [None, 0.5, 0.2])
@pytest.mark.parametrize(("side", "step"), [(32, 0.02), (96, 0.05), (224, 0.2)])
def test_waves_lower_than_half_a_grey_level_show(side: int, step: float, epsilon: float | None) -> None:
    image = (grey((1, side, side)) * 255).round() / 255
    of = task(image, "l2", epsilon=epsilon, budget=60, levels=256)
    box = Script([1 - k / 100 for k in range(60)])  # every step is taken
    asked(SimBA(step=step), of, box)
    rows = (torch.stack(box.asked) * 255).round() / 255
    assert len(rows.flatten(1).unique(dim=0)) == 60
    far = distance(rows - image, "l2")
    assert far[1] <= 2 * math.sqrt(step / 255 * side)  # values that change by a level, as many as the wave is long
    assert epsilon is None or far.max() <= epsilon


@BASES
def test_the_second_sign_is_asked_only_where_the_first_fails(basis: Any) -> None:
    image = grey()
    #             image | fails, helps | helps | fails, fails | next
    box = Script([1.0, 1.1, 0.9, 0.8, 0.85, 0.9, 0.7])
    queries = asked(SimBA(basis=basis), task(image, epsilon=5.0, budget=7), box)
    deltas = [query.rows - image for query in queries]
    assert not deltas[0].any()
    assert torch.allclose(deltas[1], -deltas[2], atol=1e-6)
    third = deltas[3] - deltas[2]
    assert float((third * deltas[1]).sum()) == pytest.approx(0, abs=1e-5)
    assert torch.allclose(deltas[4] - deltas[3], deltas[3] - deltas[5], atol=1e-6)
    assert float(((deltas[6] - deltas[3]) * (deltas[4] - deltas[3])).sum()) == pytest.approx(0, abs=1e-5)
    for delta in (deltas[1], third, deltas[4] - deltas[3], deltas[6] - deltas[3]):
        assert float(delta.norm()) == pytest.approx(0.2, rel=1e-4)


def test_a_first_sign_that_changes_nothing_is_not_asked() -> None:
    image = torch.ones(1, 4, 4)
    queries = asked(SimBA(basis="pixel"), task(image, epsilon=5.0, budget=17))
    rows = torch.cat([query.rows for query in queries])
    assert len(rows.unique(dim=0)) == 17  # the image and each pixel darkened, none brightened
    assert ((rows - image).sum(dim=(1, 2, 3))[1:] + 0.2).abs().max() < 1e-6


@BASES
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("levels", [None, 256])
def test_with_an_epsilon_every_row_is_in_the_ball(basis: Any, norm: Norm, levels: int | None) -> None:
    image = (grey((3, 8, 8)) * 255).round() / 255
    of = task(image, norm, epsilon=EPSILON[norm], budget=250, levels=levels)
    box = Script([1 - k / 500 for k in range(250)])
    asked(SimBA(basis=basis), of, box)
    rows = torch.stack(box.asked)
    if levels:
        rows = (rows * 255).round() / 255
    far = distance(rows - image, norm)
    assert far.max() <= EPSILON[norm] * (1 + 1e-5)
    assert far[-50:].min() >= 0.9 * EPSILON[norm]


@pytest.mark.parametrize(
    ("basis", "norm", "factor", "step"),
    [("pixel", "linf", 1.25, 0.2), ("dct", "linf", 2.0, 0.2), ("pixel", "l2", 1.25, 0.02), ("dct", "l2", 1.25, 0.02)],
)
def test_succeeds_a_little_beyond_the_optimum(basis: Any, norm: Norm, factor: float, step: float) -> None:
    """Frequencies that are cut off at epsilon spoil each other, hence the 2; in l2 the step is what limits the precision."""
    slope = Slope((3, 8, 8), 0.5)
    setting: dict[str, Any] = {"epsilon": factor * slope.optimum(norm), "budget": 3000}
    options = {"basis": basis, "step": step}
    assert run_attack(slope, slope.images(2), [0] * 2, "simba", norm, attack_options=options, **setting).success.all()


@BASES
@pytest.mark.parametrize("loss", ["margin", "probability", "cross-entropy"])
def test_targets_are_reached(basis: Any, loss: str) -> None:
    image = torch.full((1, 6, 6), 0.4)
    for target in (1, 2):
        setting: dict[str, Any] = {"budget": 600, "targets": target, "attack_options": {"basis": basis, "loss": loss}}
        result = run_attack(three_bands, image[None], [0], "simba", "l2", **setting)
        assert result.success.all()
        assert three_bands(result.adversarials).argmax(dim=1).tolist() == [target]


# The knob, drawing again, refusals.


@BASES
def test_the_knob_step_is_the_length_of_a_step(basis: Any) -> None:
    image = grey((3, 8, 8))
    search = SimBA(basis=basis).search(task(image, epsilon=5.0))
    box = Script()
    start = next(search)
    query = search.send(box(start.rows))
    (knob,) = query.knobs
    assert (knob.name, knob.low, knob.integer) == ("step", 0.01, False)
    assert knob.high == (1 if basis == "pixel" else pytest.approx(math.sqrt(192) / 8))
    drawn = knob.draw(0.05, 30) - image
    assert torch.allclose(drawn.flatten(1).norm(dim=1), torch.tensor(0.05), atol=1e-5)
    assert len((drawn * 1e4).round().unique(dim=0)) > 20
    knob.value = 0.07
    for _ in range(2):
        query = search.send(box(query.rows))
    assert float((query.rows - image).norm()) == pytest.approx(0.07, rel=1e-4)


@BASES
def test_a_row_drawn_again_is_a_step_in_another_direction(basis: Any) -> None:
    image = grey()
    search = SimBA(basis=basis).search(task(image, epsilon=5.0))
    box = Script([1.0, 2.0])
    query = search.send(box(next(search).rows))
    assert query.redraw is not None
    again = query.redraw([0])
    assert float(((again - image) * (query.rows - image)).sum()) == pytest.approx(0, abs=1e-6)
    second = search.send(box(again))
    assert torch.allclose(second.rows - image, image - again, atol=1e-6)
    assert second.redraw is None


@BASES
def test_refused_rows_teach_nothing(basis: Any) -> None:
    def rows(spoil: float) -> list[Tensor]:
        box = Script([1.0, 0.9, 0.1, 0.8], {0, 2, 5}, spoil)
        asked(SimBA(basis=basis), task(grey(), epsilon=0.5, budget=30), box)
        return box.asked

    one, other = rows(math.nan), rows(-50.0)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert len(one) == 30


def test_stochastic_answers_are_compared_in_pairs_and_a_success_must_come_twice() -> None:
    image = grey()
    #             image | pair: lucky success | fails when asked again, so no new try | succeeds again: a new try
    box = Script([1.0, -0.1, 1.0, 0.5, 0.4, -0.2, 0.4, 0.6, -0.2])
    queries = asked(SimBA(basis="pixel"), task(image, budget=11, stochastic=True), box)
    assert [len(query.rows) for query in queries] == [1, 2, 2, 2, 2, 2]
    first = queries[1].rows[:1]
    assert queries[2].rows[1:].equal(first)
    lengths = [float((query.rows[0] - image).norm()) for query in queries]
    assert lengths[-1] == pytest.approx(0.1, rel=1e-4)
    assert min(lengths[1:-1]) == pytest.approx(0.2, rel=1e-4)


# The threat model.


@NORMS
@BASES
@pytest.mark.parametrize("kind", degenerate((3, 8, 8)))
@pytest.mark.parametrize("epsilon", [True, False])
def test_images_without_structure(norm: Norm, basis: Any, kind: str, epsilon: bool) -> None:
    image = degenerate((3, 8, 8))[kind]
    setting: dict[str, Any] = {"epsilon": EPSILON[norm] if epsilon else None, "attack_options": {"basis": basis}}
    result = run_attack(flat_scores, image[None], [0], "simba", norm, budget=60, **setting)
    assert result.errors == [None]
    assert result.queries.tolist() == [60]


@BASES
@pytest.mark.parametrize("budget", [1, 7, 100])
def test_budgets_are_spent_to_the_row(basis: Any, budget: int) -> None:
    slope = Slope(SHAPE, 5.0)
    result = run_attack(slope, slope.images(2), [0, 0], "simba", budget=budget, attack_options={"basis": basis})
    assert result.queries.tolist() == [budget] * 2
    assert slope.rows == 2 * (budget + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "dtc"}, "unknown basis 'dtc': did you mean dct"),
        ({"step": 0.0}, "step must be above 0, got 0"),
        ({"step": math.inf}, "step must be above 0"),
        ({"factor": 0.5}, "factor must be at least 1, got 0"),
        ({"loss": "margins"}, "did you mean margin"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimBA(**options)


def test_invisible_steps_are_refused() -> None:
    options = {"basis": "pixel", "step": 0.001}
    with pytest.raises(InputError, match=r"step=0\.001 changes a value by 0\.001"):
        run_attack(flat_scores, grey()[None], [0], "simba", budget=5, levels=256, attack_options=options)
