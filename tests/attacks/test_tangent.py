"""Tangent Attack: the tangent points are those of the paper and really tangent; the distance over the optimum of a plane."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.tangent import Tangent, tangent_points
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer
from tests.attacks.analytic import Flat, drive, task, unit

SHAPE = (3, 6, 6)


def scene(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A grey source, a boundary point at distance 0.4, and a normal that leans away from the source."""
    image, ray = torch.full(SHAPE, 0.5), 0.4 * unit(SHAPE, seed)
    normal = unit(SHAPE, seed + 50) + 2 * ray
    return image, (image + ray)[None], 3 * normal[None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("long", [0.05, 0.2, 0.28])
def test_the_ball_is_touched_where_the_papers_angles_say(seed: int, long: float) -> None:
    """Algorithm 2: sin(alpha) = -<ox, u> / |ox|, cos(beta) = R / |ox|, gamma = beta - alpha."""
    image, point, normal = scene(seed)
    k = (tangent_points(image, point, normal, 1.0)(long) - point).flatten().double()
    ox, u = (image - point).flatten().double(), normal.flatten().double() / normal.double().norm()
    alpha, beta = math.asin(float(-(ox @ u) / ox.norm())), math.acos(long / float(ox.norm()))
    flat = ox - (ox @ u) * u
    expected = long * math.cos(beta - alpha) * flat / flat.norm() + long * math.sin(beta - alpha) * u
    assert torch.allclose(k, expected, atol=1e-6)
    assert float(k.norm()) == pytest.approx(long, abs=1e-6)
    assert float(k @ (ox - k)) == pytest.approx(0, abs=1e-6)  # a tangent meets its radius at a right angle
    assert float(k @ u) > 0


@pytest.mark.parametrize("ratio", [1.1, 1.7])
def test_the_ellipse_is_touched_by_the_line_from_the_source(ratio: float) -> None:
    image, point, normal = scene(0)
    long = 0.2
    k, ox = ((x - point).flatten().double() for x in (tangent_points(image, point, normal, ratio)(long), image))
    u = normal.flatten().double() / normal.double().norm()
    e = ox - (ox @ u) * u
    e /= e.norm()
    (x, z), (a, b) = ((float(v @ e), float(v @ u)) for v in (k, ox))
    short = long / ratio
    assert (x / short) ** 2 + (z / long) ** 2 == pytest.approx(1, abs=1e-5)
    assert x * a / short**2 + z * b / long**2 == pytest.approx(1, abs=1e-5)  # the source lies on the tangent at k
    assert torch.allclose(k, x * e + z * u, atol=1e-6)
    assert z > 0


@pytest.mark.parametrize("normal", ["zero", "parallel", "opposite"])
def test_degenerate_normals_leave_points_between(normal: str) -> None:
    image, point, _ = scene(1)
    ray = point - image
    points = tangent_points(image, point, {"zero": 0.0, "parallel": 2.0, "opposite": -1.0}[normal] * ray, 1.0)
    for long in (0.01, 0.2, 0.4):
        assert torch.isfinite(points(long)).all()
        assert torch.dist(points(long), image) <= 0.4 * math.sqrt(2)


def test_with_the_exact_normal_a_tangent_beats_the_step_of_hop_skip_jump() -> None:
    """From the same ball, the line from the source through k meets the plane nearer than that through the foremost point."""
    flat = Flat(SHAPE, 0.2)
    image = flat.images(1)[0]
    along = unit(SHAPE, 9)
    along = along - (along * flat.normal).sum() * flat.normal
    point = (0.5 + 0.2 * flat.normal + 0.5 * along / along.norm())[None]

    def landing(end: Tensor) -> float:
        ray = (end - image)[0]
        start = float(((image - 0.5) * flat.normal).sum())
        return float(ray.norm()) * (0.2 - start) / float((ray * flat.normal).sum())

    for long in (0.05, 0.1, 0.2, 0.3):
        tangent = landing(tangent_points(image, point, flat.normal[None], 1.0)(long))
        foremost = landing(point + long * flat.normal)
        assert 0.2 - 1e-5 <= tangent < foremost - 1e-3


@pytest.mark.parametrize("ratio", [1.0, 1.1])
def test_distance_over_the_optimum_of_a_half_space(ratio: float) -> None:
    """The limits at 5000 rows stand in the table of all attacks."""
    flat = Flat((3, 8, 8), 0.2)
    result = run_attack(flat, flat.images(8), [0] * 8, attack=Tangent(ratio=ratio), budget=1000)
    assert np.median(result.distance_at(500)) <= 1.75 * 0.2
    assert np.median(result.distance) <= 1.45 * 0.2
    assert (result.distance >= 0.2).all()
    assert flat.rows == sum(result.ledger.values())
    assert flat(result.adversarials).all()


def test_targets_are_reached_through_the_pool() -> None:
    flat = Flat((3, 8, 8), 0.2)

    def model(rows: Tensor) -> Tensor:
        """Beyond a plane lies class 1, but class 2 where the first pixel is bright."""
        return flat(rows) * torch.where(rows[:, 0, 0, 0] > 0.7, 2, 1)

    pool = ((0.5 + 3 * flat.normal).clamp(0, 1).expand(3, -1, -1, -1).clone(), torch.tensor([1, 2, 2]))
    pool[0][:, 0, 0, 0] = torch.tensor([0.1, 0.9, 0.9])
    images = flat.images(3)
    result = run_attack(model, images, [0] * 3, attack=Tangent(), targets=2, pool=pool, budget=1000)
    assert (model(result.adversarials) == 2).all()
    assert (result.distance < 0.5).all()


def test_a_step_is_halved_when_it_fails_and_lengthened_when_it_is_refused() -> None:
    image, point, normal = scene(2)
    of = task(image)
    answers = [0, 0, "refused", "refused", 0, 1]

    def told(rows: Tensor) -> Answer:
        answer: Any = answers.pop(0)
        if answer == "refused":
            return Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8))
        return Answer.of(torch.tensor([answer]))

    end, asked = drive(Tangent()._step(of, point, normal, 0.2), of, told)
    far = [torch.dist(query.rows, point).item() for query in asked]
    limit = 0.4 / math.sqrt(2)
    expected = [0.2, 0.1, 0.05, 0.075, 0.1125, 0.05625]
    assert far == pytest.approx(expected, abs=1e-5)
    assert end is not None
    assert torch.equal(end, asked[-1].rows)
    assert {query.kind for query in asked} == {"step"}
    answers = ["refused", 1]
    _, asked = drive(Tangent()._step(of, point, normal, 5.0), of, told)
    assert [torch.dist(query.rows, point).item() for query in asked] == pytest.approx([limit, limit], abs=1e-5)


def test_the_radius_knob_is_the_length_of_the_noise() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0], budget=400)
    _, asked = drive(Tangent().search(of), of, flat)
    probes = [query for query in asked if query.kind == "probe"]
    assert all(query.knobs and query.knobs[0] is probes[0].knobs[0] and query.redraw for query in probes)
    assert [len(query.rows) for query in probes[:3]] == [30, 42, 51]
    knob = probes[0].knobs[0]
    assert knob.name == "radius"
    drawn = knob.draw(0.3, 200)
    centre = drawn.mean(dim=0)
    assert (drawn - centre).flatten(1).norm(dim=1).mean().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("ratio", [0.9, float("nan")])
def test_a_flat_ellipsoid_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match=rf"^ratio must be at least 1, got {ratio}$"):
        Tangent(ratio=ratio)


def test_bad_options_of_hop_skip_jump_are_refused_too() -> None:
    with pytest.raises(InputError, match="n0 must be"):
        Tangent(n0=0)
