"""Sign-OPT: its probes and their sum, its steps, the optimum of a half-space, and what a gate makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox import run_attack
from robustbox.attacks.sign_opt import SignOPT
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, REJECTED, Answer, Norm, Query, Task
from tests.attacks.analytic import Flat, check_box, drive, refusing, task

NORMS: list[Norm] = ["l2", "linf"]


def optimum(flat: Flat, norm: Norm) -> float:
    """The distance of a Flat model's images from its plane."""
    return flat.distance if norm == "l2" else flat.distance / float(flat.normal.abs().sum())


def until(search: Any, query: Query, kind: str, answers: Callable[[Tensor], Tensor]) -> tuple[Query, list[Query]]:
    """Drive a search to its next query of a kind; what it asked before."""
    asked = []
    while query.kind != kind:
        asked.append(query)
        query = search.send(Answer.of(answers(query.rows)))
    return query, asked


def best(queries: list[Query], of: Task, answers: Callable[[Tensor], Tensor]) -> float:
    rows = torch.cat([query.rows for query in queries])
    return float(distance(rows[answers(rows) == 1] - of.image, of.norm).min())


@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("norm", NORMS)
def test_probes_lie_around_the_distance_of_the_ray_and_half_of_them_succeed(norm: Norm, levels: int | None) -> None:
    flat = Flat((3, 16, 16), 0.2)
    of = task(flat.images(1)[0], norm=norm, levels=levels, budget=10_000)
    search = SignOPT(probes=400, beta=0.02).search(of)
    query, before = until(search, next(search), "probe", flat)
    far = best(before, of, flat)
    lengths = distance(query.rows - of.image, norm)
    assert far * 0.999 <= lengths.mean().item() <= far * (1.001 if norm == "l2" else 1.06)
    assert lengths.std().item() <= 1e-3 * far
    assert len(query.rows) == 400
    assert 0.35 <= flat(query.rows).float().mean() <= 0.65
    noise = (query.rows - query.rows.mean(dim=0)).std().item()
    if levels:
        assert noise == pytest.approx(1.3 / 255, rel=0.05)
    elif norm == "l2":
        assert noise == pytest.approx(0.02 * far / math.sqrt(768), rel=0.05)


def test_the_first_step_follows_the_sum_of_the_directions_that_reached_the_goal() -> None:
    """With every sign known, the step is eta times the mean of signed unit directions, at a distance just below the best."""
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], budget=10_000)
    search = SignOPT(probes=300, beta=0.02, step=0.7).search(of)
    query, before = until(search, next(search), "probe", flat)
    far = best(before, of, flat)
    theta = next(q.rows for q in reversed(before) if flat(q.rows)[0] and len(q.rows) == 1) - of.image
    theta = theta / theta.norm()
    # Directions, as far as rows show them: what a row has beside the ray.
    aside = query.rows - of.image - theta * ((query.rows - of.image) * theta).sum(dim=(1, 2, 3), keepdim=True)
    directions = aside / (0.02 * far)
    signs = (2 * flat(query.rows) - 1).float().view(-1, 1, 1, 1)
    step = search.send(Answer.of(flat(query.rows)))
    assert step.kind == "step"
    expected = theta + 0.7 * (signs * directions).mean(dim=0, keepdim=True)
    got = step.rows - of.image
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) >= 0.9999
    tolerance = 0.02 * far / (2 * math.sqrt(192))
    assert float(got.norm()) == pytest.approx(far - tolerance, rel=1e-4)
    cosine = F.cosine_similarity((got / got.norm() - theta).flatten(), flat.normal.flatten(), dim=0)
    assert cosine >= 0.8 * math.sqrt(300 / (300 + math.pi / 2 * 192))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [200, 3000])
def test_estimates_leave_rows_for_steps(norm: Norm, budget: int) -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], norm=norm, budget=budget)
    _, asked = drive(SignOPT().search(of), of, flat)
    left, sizes = budget, []
    for query in asked:
        if query.kind == "probe":
            assert len(query.rows) == min(200, max(left // 8, 10))
            sizes.append(len(query.rows))
        left -= len(query.rows)
    assert sizes[0] == 200 if budget == 3000 else sizes[0] < 25
    assert len(sizes) >= 4
    assert sum(query.kind == "step" for query in asked) > 10


def test_in_linf_values_at_the_edge_stay_there_while_others_move() -> None:
    """Of a start at a corner of the ball, a step moves back only the values that gain by it."""
    flat = Flat((3, 8, 8), 0.2)
    image = flat.images(1)[0]
    of = task(image, norm="linf", budget=10_000, start=image + 0.3 * flat.normal.sign())
    search = SignOPT(step=2.0).search(of)
    query, _ = until(search, next(search), "probe", flat)
    moved = (search.send(Answer.of(flat(query.rows))).rows - of.image).abs()
    still = float((moved > 0.999 * moved.max()).float().mean())
    assert 0.5 < still < 1


def test_steps_double_while_they_gain_and_are_quartered_where_the_first_fails() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0])
    image = of.image
    search = SignOPT(probes=50).search(of)
    query, _ = until(search, next(search), "probe", flat)
    query = search.send(Answer.of(torch.arange(50) % 2))

    def angle(rows: Tensor) -> Tensor:
        return F.normalize((rows - image).flatten(), dim=0)

    failed = []
    while query.kind == "step":
        failed.append(angle(query.rows))
        query = search.send(Answer.of(torch.zeros(1).long()))
    assert query.kind == "probe"
    assert len(failed) == 30
    steps = [float((a - failed[-1]).norm()) for a in failed[:6]]
    for wide, narrow in pairwise(steps[:4]):
        assert narrow / wide == pytest.approx(0.25, rel=0.1)


FIGURES = [
    ("l2", False, (1.25, 1.03)),
    ("l2", True, (1.05, 1.02)),
    ("linf", False, (1.8, 1.7)),
    ("linf", True, (2.0, 1.6)),
]


@pytest.mark.parametrize(("norm", "targeted", "figures"), FIGURES)
def test_distance_over_the_optimum_of_a_half_space(norm: Norm, targeted: bool, figures: tuple[float, float]) -> None:
    flat = Flat((3, 8, 8), 0.5)
    aim: dict[str, Any] = {"targets": 1, "pool": (flat.images(4) + 1.5 * flat.normal, [1] * 4)} if targeted else {}
    result = run_attack(flat, flat.images(8), [0] * 8, attack="sign-opt", norm=norm, budget=5000, **aim)
    ratios = [float(np.median(result.distance_at(q))) / optimum(flat, norm) for q in (1000, 5000)]
    assert (np.array(ratios) <= figures).all(), ratios
    assert (result.distance >= optimum(flat, norm) * 0.999).all()
    assert flat.rows == sum(result.ledger.values())
    assert (result.queries == 5000).all()
    assert flat(result.adversarials).all()


def test_rounding_to_8_bits_costs_little() -> None:
    flat = Flat((3, 16, 16), 0.6, 256)
    images = (flat.images(4) * 255).round() / 255
    beyond = 0.6 - ((images - 0.5) * flat.normal).sum(dim=(1, 2, 3)).numpy()
    result = run_attack(flat, images, [0] * 4, attack="sign-opt", budget=3000, levels=256)
    assert np.median(result.distance / beyond) <= 1.6


def test_rays_is_ahead_in_linf() -> None:
    flat = Flat((3, 8, 8), 0.2)
    settings: dict[str, Any] = {"norm": "linf", "budget": 1000}
    other, ours = (run_attack(flat, flat.images(4), [0] * 4, attack=a, **settings) for a in ("rays", "sign-opt"))
    for mark in (250, 500, 1000):
        assert np.median(other.distance_at(mark)) < np.median(ours.distance_at(mark))


@pytest.mark.parametrize("norm", NORMS)
def test_the_knob_is_the_length_of_the_noise_and_redrawn_probes_count(norm: Norm) -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], norm=norm)
    search = SignOPT(probes=40).search(of)
    query, _ = until(search, next(search), "probe", flat)
    (knob,) = query.knobs
    assert (knob.name, knob.low, knob.high) == ("radius", pytest.approx(1e-3 * 192**0.5), pytest.approx(192**0.5 / 8))
    for radius in (0.02, 0.1):
        rows = knob.draw(radius, 500)
        noise = (rows - rows.mean(dim=0)).flatten(1).norm(dim=1)
        assert noise.mean().item() == pytest.approx(radius, rel=0.1)
    knob.value = 0.05
    assert query.redraw is not None
    rows = query.rows.clone()
    fresh = query.redraw([3, 17])
    rows[[3, 17]] = fresh
    # Only the two redrawn rows reach the goal, all others were refused: the step goes to their sum.
    labels, status = torch.full((40,), -1), torch.full((40,), REJECTED, dtype=torch.uint8)
    labels[[3, 17]], status[[3, 17]] = 1, ANSWERED
    centre = (rows - of.image).mean(dim=0)
    step = search.send(Answer(labels, None, status))
    assert step.kind == "step"
    toward = step.rows[0] - of.image
    toward, centre = toward / toward.norm(), centre / centre.norm()
    aside = (fresh - of.image).mean(dim=0)
    aside = aside / aside.norm() - centre
    assert F.cosine_similarity((toward - centre).flatten(), aside.flatten(), dim=0) >= (0.9 if norm == "l2" else 0.7)


@pytest.mark.parametrize("refused", [1, 9, 57, 240, 241, 242, 245])
def test_a_refused_row_does_not_end_it(refused: int) -> None:
    flat = Flat((3, 8, 8), 0.2)
    answers = refusing(flat, lambda number: number == refused - 1)
    of = task(flat.images(1)[0], budget=2500)
    _, queries = drive(SignOPT().search(of), of, answers)
    assert best(queries, of, flat) <= 1.4 * 0.2


def test_refused_steps_go_further_next_time() -> None:
    of = task(torch.full((1, 8, 8), 0.5))
    search = SignOPT(probes=50).search(of)
    query, _ = until(search, next(search), "probe", lambda rows: torch.ones(len(rows)).long())
    angles = []
    for _ in range(3):
        theta = F.normalize((query.rows - of.image).mean(dim=0).flatten(), dim=0)
        query = search.send(Answer.of(torch.arange(50) % 2))
        angles.append(float((F.normalize((query.rows - of.image).flatten(), dim=0) - theta).norm()))
        query = search.send(Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8)))
        assert query.kind == "probe"
    assert angles[0] < angles[1] < angles[2]


def test_a_lucky_answer_does_not_freeze_it() -> None:
    flat = Flat((3, 8, 8), 0.2)
    noise = torch.Generator().manual_seed(5)

    def answers(rows: Tensor) -> Tensor:
        return flat(rows) ^ (torch.rand(len(rows), generator=noise) < 0.1).long()

    of = task(flat.images(1)[0], budget=5000, stochastic=True)
    _, queries = drive(SignOPT().search(of), of, answers)
    final = [query.rows for query in queries if query.kind == "probe"][-1]
    assert 0.15 <= float(distance(final - of.image, "l2").median()) <= 0.5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("label", [0, 1])
def test_degenerate_images_and_models(label: int, levels: int | None, value: float, norm: Norm) -> None:
    def model(rows: Tensor) -> Tensor:
        check_box(rows)
        return label * (rows - value).abs().flatten(1).amax(1).gt(0.003).long()  # at the image itself, class 0

    images = torch.full((2, 3, 4, 4), value)
    for budget in (1, 7, 500):
        result = run_attack(model, images, [0, 0], attack="sign-opt", norm=norm, budget=budget, levels=levels)
        assert result.errors == [None, None]
        assert (result.queries <= budget).all()


@pytest.mark.parametrize(
    ("option", "value"), [("probes", 0), ("beta", 0.0), ("beta", 1.0), ("step", 0.0), ("step", math.nan)]
)
def test_bad_options_are_refused_in_one_line(option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{option} must be .*, got {value}$"):
        SignOPT(**{option: value})
