"""GeoDA: the direction that is right for each norm, the paper's split of rows, and the distance over the optimum of a plane."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks import geoda
from robustbox.attacks.geoda import GeoDA
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Norm, Query
from tests.attacks.analytic import Flat, drive, task, unit

SHAPE = (3, 8, 8)
FLAT = Flat(SHAPE, 0.2)
OPTIMUM: dict[Norm, float] = {"l2": 0.2, "linf": 0.2 / float(FLAT.normal.abs().sum())}
NORMS: list[Norm] = ["l2", "linf"]


@pytest.mark.parametrize("norm", NORMS)
def test_with_the_exact_normal_the_first_iteration_lands_on_the_optimum(
    monkeypatch: pytest.MonkeyPatch, norm: Norm
) -> None:
    points: list[Tensor] = []

    def exact(of: Any, point: Tensor, *_: Any) -> Generator[Query, Answer, tuple[Tensor, float]]:
        points.append(point)
        yield from ()
        return 3 * FLAT.normal[None], 0.5

    monkeypatch.setattr(geoda, "estimate_normal", exact)
    of = task(FLAT.images(1)[0], norm, budget=80)
    drive(GeoDA().search(of), of, FLAT)
    first, second = (float(distance(point - of.image, norm)) for point in points[:2])
    assert first > 2 * OPTIMUM[norm]
    assert second == pytest.approx(OPTIMUM[norm], abs=0.01 * first)


@pytest.mark.parametrize(("norm", "figures"), [("l2", (1.45, 1.27)), ("linf", (1.45, 1.27))])
def test_distance_over_the_optimum_of_a_half_space(norm: Norm, figures: tuple[float, float]) -> None:
    """The limits at 5000 rows stand in the table of all attacks."""
    rows = FLAT.rows
    result = run_attack(FLAT, FLAT.images(8), [0] * 8, attack=GeoDA(), norm=norm, budget=1000)
    found = [np.median(result.distance_at(q)) / OPTIMUM[norm] for q in (500, 1000)]
    assert (np.array(found) <= figures).all(), found
    assert (result.distance >= OPTIMUM[norm]).all()
    assert FLAT.rows - rows == sum(result.ledger.values())


def test_the_sum_of_estimates_beats_the_last_one_on_a_plane() -> None:
    """A plane has one normal: what was learnt of it earlier holds for ever."""
    images = FLAT.images(6)
    summed, last = (
        run_attack(FLAT, images, [0] * 6, attack=GeoDA(memory=memory), norm="linf", budget=800).distance
        for memory in (1.0, 0.0)
    )
    assert np.median(summed) * 1.15 < np.median(last)


def test_a_subspace_that_holds_the_normal_needs_far_fewer_queries() -> None:
    flat = Flat((3, 16, 16), 0.2)
    inside = geoda.sampler("dct", (3, 16, 16), 4, torch.Generator().manual_seed(3))(1)[0]
    flat.normal = inside / inside.norm()
    images = torch.full((5, 3, 16, 16), 0.5) + 1e-4 * torch.arange(5).view(5, 1, 1, 1)
    reduced, full = (
        np.median(run_attack(flat, images, [0] * 5, attack=GeoDA(subspace=name), budget=400).distance)
        for name in ("dct", "full")
    )
    assert reduced < 1.4 * 0.2
    assert full > 1.6 * 0.2


@pytest.mark.parametrize(("budget", "cost", "rate"), [(1000, 11, 0.6), (4000, 25, 0.6), (500, 10, 0.9)])
def test_the_split_spends_the_budget_on_as_many_iterations_as_it_can(budget: int, cost: int, rate: float) -> None:
    attack = GeoDA(rate=rate)
    first, iterations = attack.split(budget, cost)
    assert first >= attack.n0
    weights = [rate ** (-2 * t / 3) for t in range(iterations + 1)]
    assert first * sum(weights[:-1]) + cost * iterations == pytest.approx(budget)
    assert (budget - cost * (iterations + 1)) / sum(weights) < attack.n0


@pytest.mark.parametrize("budget", [1, 5, 30])
def test_a_budget_for_less_than_one_iteration_is_not_split(budget: int) -> None:
    assert GeoDA().split(budget, 11)[1] == 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_search_asks_what_the_split_says(norm: Norm) -> None:
    of = task(FLAT.images(1)[0], norm, budget=700)
    _, asked = drive(GeoDA().search(of), of, FLAT)
    probes = [query for query in asked if query.kind == "probe"]
    begin = next(i for i, query in enumerate(asked) if query.kind == "probe")
    spent = sum(len(query.rows) for query in asked[:begin])
    cost = 1 + math.ceil(math.log2(math.sqrt(FLAT.normal.numel()) / (2 * geoda.NOISE_LENGTH)))
    first, iterations = GeoDA().split(700 - spent, cost)
    planned = [round(first * 0.6 ** (-2 * t / 3)) for t in range(iterations)]
    assert [len(query.rows) for query in probes[: iterations - 1]] == planned[:-1]
    lines = [query for query in asked[begin:] if query.kind != "probe"]
    assert all(len(query.rows) == 1 for query in lines)
    assert sum(len(query.rows) for query in asked) >= 690


def test_the_radius_knob_is_the_length_of_the_noise() -> None:
    of = task(FLAT.images(1)[0], budget=300)
    _, asked = drive(GeoDA().search(of), of, FLAT)
    probes = [query for query in asked if query.kind == "probe"]
    assert all(query.redraw and query.knobs[0] is probes[0].knobs[0] for query in probes)
    drawn = probes[0].knobs[0].draw(0.3, 200)
    assert (drawn - drawn.mean(dim=0)).flatten(1).norm(dim=1).mean().item() == pytest.approx(0.3, rel=0.05)
    assert not any(query.knobs for query in asked if query.kind != "probe")


@pytest.mark.parametrize("norm", NORMS)
def test_a_direction_that_fails_is_halved_and_a_refused_step_goes_further(norm: Norm) -> None:
    image, ray = torch.full(SHAPE, 0.5), unit(SHAPE, 4)[None]
    point = image + 0.2 * ray / distance(ray, norm).float()
    normal = unit(SHAPE, 5)[None]
    of, answers = task(image, norm), ["refused", 0, 0, 0]

    def told(rows: Tensor) -> Answer:
        answer: Any = answers.pop(0)
        if answer == "refused":
            return Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8))
        return Answer.of(torch.tensor([answer]))

    kept, asked = drive(GeoDA()._approach(of, point, normal, 0.01), of, told)
    assert kept is not None
    assert torch.equal(kept, point)
    far = [float(distance(query.rows - image, norm)) for query in asked]
    assert far == pytest.approx([0.2, 0.3, 0.3, 0.3], rel=1e-4)
    v = normal.sign() if norm == "linf" else normal
    leaning = [torch.cosine_similarity((query.rows - image).flatten(), (point - image).flatten(), 0) for query in asked]
    assert torch.allclose((asked[0].rows - image) / 0.2, v, atol=1e-4)
    assert leaning[0] == pytest.approx(float(leaning[1]), abs=1e-4)
    assert leaning[1] < leaning[2] - 0.2
    assert leaning[2] < leaning[3] - 0.1


@pytest.mark.parametrize("norm", NORMS)
def test_8_bits_cost_little(norm: Norm) -> None:
    flat = Flat((3, 16, 16), 0.3)
    images = (flat.images(4) * 255).round() / 255
    optimum = 0.3 / (1.0 if norm == "l2" else float(flat.normal.abs().sum()))
    result = run_attack(flat, images, [0] * 4, attack=GeoDA(), norm=norm, levels=256, budget=2000)
    assert result.errors == [None] * 4
    assert np.median(result.distance) <= 1.5 * optimum


@pytest.mark.parametrize(
    ("option", "value"), [("n0", 0), ("rate", 1.0), ("rate", 0.0), ("factor", 0.5), ("memory", 1.5)]
)
def test_bad_options_are_refused_in_one_line(option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{option} must be .*, got {value}$"):
        GeoDA(**{option: value})


def test_targets_are_refused() -> None:
    with pytest.raises(InputError):
        run_attack(FLAT, FLAT.images(1), [0], attack=GeoDA(), targets=1, budget=10)
