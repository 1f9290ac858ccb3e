"""HopSkipJump: geometry of its steps, counted rows, distance over the known optimum, knob and redraw, hard cases."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks import hop_skip_jump
from robustbox.attacks.hop_skip_jump import STEPS, HopSkipJump, Lift
from robustbox.attacks.moves import radius_knob
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Norm, Query, Search, Task
from tests.attacks.analytic import Flat, drive, refusing, task, unit

SHAPE, SIXTEEN = (3, 8, 8), (3, 16, 16)
NORMS: list[Norm] = ["l2", "linf"]


def optimum(flat: Flat, norm: Norm) -> float:
    return flat.distance / (1 if norm == "l2" else float(flat.normal.abs().sum()))


def asked_by(flat: Flat, norm: Norm = "l2", budget: int = 1000, attack: HopSkipJump | None = None) -> list[Query]:
    of = task(flat.images(1)[0], norm, budget=budget)
    return drive((attack or HopSkipJump()).search(of), of, flat)[1]


# Distance over the optimum of a half-space


@pytest.mark.parametrize(("norm", "figures"), [("l2", (1.18, 1.05)), ("linf", (1.39, 1.13))])
def test_distance_over_the_optimum_of_a_half_space(norm: Norm, figures: tuple[float, float]) -> None:
    flat = Flat(SHAPE, 0.2)
    images = flat.images(5)
    result = run_attack(flat, images, [0] * 5, attack=HopSkipJump(), norm=norm, budget=5000)
    ratios = [float(np.median(result.distance_at(q))) / optimum(flat, norm) for q in (1000, 5000)]
    assert ratios[0] <= 1.05 * figures[0]
    assert ratios[1] <= 1.02 * figures[1]
    assert (result.distance >= optimum(flat, norm) - 1e-6).all()
    assert flat.rows == sum(result.ledger.values())
    assert flat(result.adversarials).all()
    assert distance(result.adversarials - images, norm).numpy() == pytest.approx(result.distance, abs=1e-6)


@pytest.mark.parametrize(("norm", "factor"), [("l2", 1.25), ("linf", 1.9)])
def test_rounding_to_8_bits_leaves_it_working(norm: Norm, factor: float) -> None:
    flat = Flat(SHAPE, 0.2)
    images = (flat.images(6) * 255).round() / 255
    result = run_attack(flat, images, [0] * 6, attack=HopSkipJump(), norm=norm, budget=2000, levels=256)
    assert np.median(result.distance) <= factor * optimum(flat, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_a_target_is_reached_from_the_pool(norm: Norm) -> None:
    flat = Flat(SHAPE, 0.2)
    images = flat.images(5)

    def three(rows: Tensor) -> Tensor:
        """Class 1 lies one way, class 2 the other, nearer."""
        along = ((rows - 0.5).flatten(1) @ flat.normal.flatten()).double()
        return (along > 0.2).long() + 2 * (along < -0.05).long()

    pool = ((0.5 + 0.5 * flat.normal + 0.4 * unit(SHAPE, 77)).clamp(0, 1)[None], [1])
    result = run_attack(three, images, [0] * 5, attack=HopSkipJump(), norm=norm, targets=1, pool=pool, budget=1500)
    assert (three(result.adversarials) == 1).all()
    assert np.median(result.distance) < 1.5 * optimum(flat, norm)


# What it asks


@pytest.mark.parametrize("norm", NORMS)
def test_rows_are_counted_as_the_docstring_says(norm: Norm) -> None:
    """Estimate t: floor(n0 sqrt(t)) rows; then one or more steps; then ceil(log2(1 / theta)) halvings, one more or less."""
    queries = asked_by(Flat(SHAPE, 0.2), norm, budget=1500, attack=HopSkipJump(n0=20))
    probes = [k for k, query in enumerate(queries) if query.kind == "probe"]
    assert len(probes) > 10
    assert [len(queries[k].rows) for k in probes[:-1]] == [int(20 * math.sqrt(t)) for t in range(1, len(probes))]
    halvings = math.ceil(math.log2(20 * math.sqrt(192)))
    for a, b in pairwise(probes):
        kinds = [query.kind for query in queries[a + 1 : b]]
        steps = kinds.count("step")
        assert 1 <= steps <= STEPS
        assert kinds == ["step"] * steps + ["line"] * (len(kinds) - steps)
        assert abs(len(kinds) - steps - halvings) <= 1
    assert all(len(query.rows) == 1 for query in queries if query.kind in ("step", "line") and query is not queries[1])


@pytest.mark.parametrize("norm", NORMS)
def test_noise_steps_and_ways_back_are_the_papers(monkeypatch: pytest.MonkeyPatch, norm: Norm) -> None:
    flat = Flat(SHAPE, 0.2)
    normals: list[Tensor] = []
    points: list[Tensor] = []
    real = hop_skip_jump.estimate_normal

    def noted(of: Task, point: Tensor, *args: Any, **options: Any) -> Search:
        points.append(point)
        found = yield from real(of, point, *args, **options)
        normals.append(found[0])
        return found

    monkeypatch.setattr(hop_skip_jump, "estimate_normal", noted)
    image = flat.images(1)[0]
    queries = asked_by(flat, norm, budget=1200)
    radii = [float(distance(point - image, norm)) for point in points]
    starts = [k for k, query in enumerate(queries) if query.kind == "probe"]
    for t, (k, point, normal, radius) in enumerate(zip(starts[:-1], points, normals, radii, strict=False), start=1):
        # delta = sqrt(d) theta R for l2, d theta R for linf, with theta = 1 / (20 sqrt(d)).
        delta = radius / 20 * (1 if norm == "l2" else math.sqrt(192))
        lengths = torch.linalg.vector_norm((queries[k].rows - point).flatten(1), dim=1)
        assert float(lengths.square().mean().sqrt()) == pytest.approx(delta, rel=0.1)
        v = normal.sign() if norm == "linf" else normal / normal.norm()
        steps = [query.rows for query in queries[k + 1 : starts[t]] if query.kind == "step"]
        for j, step in enumerate(steps):
            xi = radius / math.sqrt(t) / 2**j
            assert torch.allclose(step, (point + xi * v).clamp(0, 1), atol=1e-5)
        lines = [query.rows for query in queries[k + 1 + len(steps) : starts[t]]]
        for row in lines:
            if norm == "linf":
                r = float(distance(row - image, norm))
                assert torch.allclose(row, steps[-1].clamp(image - r, image + r), atol=1e-6)
            else:
                ray = steps[-1] - image
                assert torch.allclose(row, image + ray * ((row - image).norm() / ray.norm()), atol=1e-5)


# Knob and redraw


def test_the_knob_sets_the_length_of_the_noise_and_draws_from_its_distribution() -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], budget=10_000)
    search = HopSkipJump().search(of)
    query = next(search)
    while query.kind != "probe":
        query = search.send(Answer.of(flat(query.rows)))
    (knob,) = query.knobs
    assert knob.name == "radius"
    assert (knob.low, knob.high) == pytest.approx((1e-3 * math.sqrt(192), math.sqrt(192) / 8))
    centre = query.rows.mean(dim=0)
    drawn = knob.draw(0.3, 500)
    assert drawn.shape == (500, *SHAPE)
    assert torch.dist(drawn.mean(dim=0), centre) < 0.1
    assert (drawn - centre).flatten(1).norm(dim=1).mean() == pytest.approx(0.3, rel=0.05)
    knob.value = 0.3
    assert query.redraw is not None
    fresh = query.redraw([0, 2])
    assert (fresh - centre).flatten(1).norm(dim=1).mean() == pytest.approx(0.3, rel=0.2)
    assert not torch.allclose(fresh[0], query.rows[0], atol=1e-3)
    # The next estimate keeps to it.
    rows = query.rows.clone()
    rows[[0, 2]] = fresh
    query = search.send(Answer.of(flat(rows)))
    while query.kind != "probe":
        query = search.send(Answer.of(flat(query.rows)))
    assert query.knobs == (knob,)
    assert (query.rows - query.rows.mean(dim=0)).flatten(1).norm(dim=1).mean() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("lifted", [True, False])
def test_noise_of_another_length_is_centred_where_it_tells_something(
    lifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goal is a ball: long noise around a point of its surface leaves it, around one r^2 / 2R below half of it does."""
    r, bend = 1.0, 2.0
    image = torch.full(SIXTEEN, 0.5)
    centre = image + 4 * unit(SIXTEEN, 0)
    of = task(image, target=1)
    if not lifted:
        monkeypatch.setattr(hop_skip_jump, "LOPSIDED", 0.0)
    attack, knob = HopSkipJump(n0=100), radius_knob(image)
    knob.value = r
    point = torch.lerp(centre, image, bend / 4)[None]  # the ball's surface
    probes: list[Tensor] = []

    def ball(rows: Tensor) -> Answer:
        probes.append(rows)
        return Answer.of(((rows - centre).flatten(1).norm(dim=1) < bend).long())

    drive(attack._normal(of, point, 0.01, 300, attack._sampler(of), knob, Lift()), of, ball)
    rows = torch.cat(probes[-10:])
    inside = ((rows - centre).flatten(1).norm(dim=1) < bend).float().mean()
    deep = bend - float((rows.mean(dim=0) - centre).norm())
    assert len(torch.cat(probes)) == 300
    assert (0.2 < inside < 0.8) if lifted else inside == 0
    assert deep == pytest.approx(r**2 / (2 * bend) if lifted else 0.0, abs=0.08)


# Hard cases


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("number", [0, 3, 9, 20, 57, 90])
def test_one_refused_row_does_not_end_it(norm: Norm, number: int) -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], norm, budget=1500)
    _, queries = drive(HopSkipJump().search(of), of, refusing(flat, lambda k: k == number))
    found = torch.cat([query.rows for query in queries])
    assert distance(found[flat(found) == 1] - of.image, norm).min() < 1.6 * optimum(flat, norm)


def test_refused_rows_carry_no_information() -> None:
    flat = Flat(SHAPE, 0.2)
    transcripts = []
    for garbage in (-1, 0, 1):
        of = task(flat.images(1)[0])
        _, queries = drive(HopSkipJump().search(of), of, refusing(flat, lambda k: k % 7 == 6, garbage))
        transcripts.append(torch.cat([query.rows for query in queries]))
    assert torch.equal(transcripts[0], transcripts[1])
    assert torch.equal(transcripts[0], transcripts[2])


def test_a_refused_step_is_lengthened_and_a_failed_one_halved() -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0])
    point = (of.image + 0.3 * flat.normal)[None]
    script = [(-1, REJECTED), (0, 0), (0, 0), (1, 0)]

    def answers(_: Tensor) -> Answer:
        label, status = script.pop(0)
        return Answer(torch.tensor([label]), None, torch.tensor([status], dtype=torch.uint8))

    end, queries = drive(HopSkipJump()._step(of, point, flat.normal[None], 0.1), of, answers)
    lengths = [torch.dist(query.rows, point).item() for query in queries]
    assert lengths == pytest.approx([0.1, 0.15, 0.075, 0.0375], rel=1e-3)
    assert torch.equal(end, queries[-1].rows)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [1, 7, 29, 100])
def test_budgets_are_spent_to_the_row(norm: Norm, budget: int) -> None:
    flat = Flat(SHAPE, 0.05)
    result = run_attack(flat, flat.images(2), [0] * 2, attack=HopSkipJump(), norm=norm, budget=budget)
    assert result.errors == [None] * 2
    assert (result.queries == budget).all()
    assert flat.rows == sum(result.ledger.values())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("label", [0, 1])
def test_flat_images_and_constant_models(norm: Norm, value: float, label: int) -> None:
    """A model that never changes ends it; one that always says yes leads it to the image; neither fails."""
    of = task(torch.full((1, 5, 8), value), norm, budget=400)
    _, queries = drive(HopSkipJump().search(of), of, lambda rows: torch.full((len(rows),), label))
    nearest = min(float(distance(query.rows - of.image, norm).min()) for query in queries)
    assert (nearest < 1e-3) if label else (of.remaining > 0)


@pytest.mark.parametrize("norm", NORMS)
def test_random_answers_neither_fail_nor_hang(norm: Norm) -> None:
    coin = torch.Generator().manual_seed(0)
    of = task(torch.rand(3, 6, 6, generator=coin), norm, budget=1500, stochastic=True)
    _, queries = drive(HopSkipJump().search(of), of, lambda rows: torch.randint(2, (len(rows),), generator=coin))
    assert sum(len(query.rows) for query in queries) > 100


def test_a_lucky_incumbent_is_left_behind() -> None:
    """A stochastic box that once, far too near, says yes: the search steps outward and ends at the true distance."""
    flat = Flat(SHAPE, 0.2)
    image = flat.images(1)[0]
    lines = 0

    def answers(rows: Tensor) -> Tensor:
        nonlocal lines
        near = len(rows) == 1 and torch.dist(rows[0], image) < 0.19
        lines += near
        return torch.ones(1).long() if near and lines == 1 else flat(rows)

    of = task(image, budget=1500, stochastic=True)
    _, queries = drive(HopSkipJump().search(of), of, answers)
    late = torch.cat([query.rows for query in queries[-20:]])
    assert lines > 1
    assert distance(late[flat(late) == 1] - image, "l2").min() < 1.4 * 0.2


@pytest.mark.parametrize(("option", "value"), [("n0", 0), ("theta", 0.0), ("theta", 1.0), ("theta", float("nan"))])
def test_bad_options_are_refused_in_one_line(option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{option} must be .*, got {value}$"):
        HopSkipJump(**{option: value})  # type: ignore[arg-type]
