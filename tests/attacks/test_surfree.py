"""SurFree: the circle of the paper, directions that are orthogonal to all they should be, and what it makes of a plane."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.directions import Basis, Directions, Weights, proposal
from robustbox.attacks.subspaces import dct_matrix
from robustbox.attacks.surfree import LARGEST, Plane, SurFree
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Knob
from tests.attacks.analytic import Flat, drive, task, unit

SHAPE = (3, 8, 8)


def directions(image: Tensor, memory: int = 100, seed: int = 0) -> Directions:
    return Directions(image, *proposal(task(image, seed=seed), "dct", 0.5, "constant"), memory)


# Directions


def test_directions_are_orthogonal_to_the_ray_and_to_all_that_are_remembered() -> None:
    """While few are remembered, and after old ones were forgotten, when the ray leans on what is gone."""
    image = torch.full(SHAPE, 0.5)
    of, kept, ray = directions(image, memory=20), [], 0.3 * unit(SHAPE, 3)[None]
    for k in range(60):
        v = of.draw(ray, 1)
        assert float(v.norm()) == pytest.approx(1, abs=1e-5)
        assert abs(float((v * ray).sum() / ray.norm())) < 1e-5
        for earlier in kept[-20:]:
            assert abs(float((v * earlier).sum())) < 1e-5
        of.remember(v)
        kept.append(v)
        turned = math.cos(0.2) * ray + math.sin(0.2) * ray.norm() * v  # as an accepted angle turns it
        ray = turned if k % 2 else ray
    assert sum(abs(float((kept[-1] * earlier).sum())) > 0.01 for earlier in kept[:39]) > 10  # forgotten


def test_a_batch_of_directions_is_orthogonal_too_but_not_remembered() -> None:
    image = torch.full(SHAPE, 0.5)
    of, ray = directions(image), unit(SHAPE, 3)[None]
    first = of.draw(ray, 1)
    of.remember(first)
    batch = of.draw(ray, 6)
    assert batch.shape == (6, *SHAPE)
    assert torch.allclose(batch.flatten(1).norm(dim=1), torch.ones(6), atol=1e-5)
    assert (batch.flatten(1) @ torch.cat([ray, first]).flatten(1).T).abs().max() < 1e-5
    assert (batch[0] * batch[1]).sum().abs() > 1e-4


@pytest.mark.parametrize("memory", [0, 1000])
def test_memory_leaves_half_of_the_dimensions(memory: int) -> None:
    """Of 8 dimensions 4 are remembered: there is always another direction, and never the same."""
    image = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    of, ray = directions(image, memory=memory), unit((1, 4, 4), 3)[None]
    for _ in range(30):
        v = of.draw(ray, 1)
        assert float(v.norm()) == pytest.approx(1, abs=1e-4)
        of.remember(v)


@pytest.mark.parametrize(("basis", "side"), [("dct", 16), ("dct-8x8", 8)])
def test_directions_lie_on_the_lowest_frequencies(basis: Basis, side: int) -> None:
    image = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    sample, dimensions = proposal(task(image), basis, 0.25, "constant")
    drawn = sample(50)
    assert dimensions == 2 * 16 * 16 // 4
    matrix = dct_matrix(side, drawn.device)
    blocks = drawn.unfold(2, side, side).unfold(3, side, side)
    coefficients = (matrix @ blocks @ matrix.T).reshape(-1, side, side)
    i, j = torch.arange(side)[:, None], torch.arange(side)
    limit = int((i + j).flatten().sort()[0][side * side // 4])
    assert coefficients[:, i + j > limit].abs().max() < 1e-5
    low = coefficients[:, i + j < limit]
    assert torch.allclose(low, low.round(), atol=1e-5)
    shares = [(low.round() == value).float().mean().item() for value in (-1, 0, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.02)


@pytest.mark.parametrize(("basis", "shape"), [("dct-8x8", (3, 12, 9)), ("dct", (1, 5, 11)), ("dct-8x8", (1, 1, 1))])
@pytest.mark.parametrize("weights", ["constant", "tanh"])
def test_any_size_of_image_has_directions(basis: Basis, shape: tuple[int, int, int], weights: Weights) -> None:
    sample, dimensions = proposal(task(torch.rand(shape)), basis, 0.5, weights)
    assert sample(4).shape == (4, *shape)
    assert dimensions > 0


def test_tanh_prefers_what_the_image_holds() -> None:
    wave = dct_matrix(16, torch.device("cpu"))[3]
    image = (0.5 + 0.5 * wave[:, None] * wave[None] / wave.max() ** 2).expand(1, 16, 16).contiguous()
    sample, _ = proposal(task(image), "dct", 0.5, "tanh")
    matrix = dct_matrix(16, image.device)
    held = (matrix @ sample(200) @ matrix.T).square().mean(dim=(0, 1))
    others = held.clone()
    others[0, 0] = others[3, 3] = 0
    assert held[3, 3] > 100 * others.max() > 0


# The circle


def test_the_circle_is_the_papers() -> None:
    image, ray = torch.full(SHAPE, 0.5), 0.3 * unit(SHAPE, 1)[None]
    plane = Plane(image, image + ray, directions(image))
    assert plane.radius == pytest.approx(0.3, abs=1e-6)
    forth, back = plane.turn(30.0) - image, plane.turn(-30.0) - image
    u = ray / 0.3
    assert float(forth.norm()) == pytest.approx(0.3 * math.cos(math.radians(30)), abs=1e-6)
    for side in (forth, back):
        assert float((side * u).sum() / side.norm()) == pytest.approx(math.cos(math.radians(30)), abs=1e-5)
    assert torch.allclose((forth + back) / 2, 0.3 * math.cos(math.radians(30)) ** 2 * u, atol=1e-6)
    along = plane.ray(30.0)(0.2) - image
    assert torch.allclose(along / 0.2, forth / forth.norm(), atol=1e-5)
    first = plane.turn(30.0)
    assert not torch.allclose(plane.renew().turn(30.0), first, atol=1e-3)


def scene(seed: int) -> tuple[Plane, Callable[[Tensor], Tensor], float]:
    """A circle through a point of a flat boundary, what is beyond that, and the angle a* of the nearest point in degrees."""
    image, normal = torch.full(SHAPE, 0.5), unit(SHAPE, 1)
    along = unit(SHAPE, 40 + seed)
    along = along - (along * normal).sum() * normal
    point = image + 0.2 * (normal * (1 + 1e-5) + along / along.norm())[None]
    plane = Plane(image, point, directions(image, seed=seed))

    def beyond(rows: Tensor) -> Tensor:
        return (((rows - image).double() * normal).sum(dim=(1, 2, 3)) > 0.2).long()

    def star() -> float:
        u, v = ((plane.ray(angle)(0.1)[0] - image).flatten() @ normal.flatten() for angle in (0.0, 90.0))
        return math.degrees(math.atan2(float(v), float(u)))

    while abs(star()) < 1:  # too small to be measured in float32
        plane.renew()
    return plane, beyond, star()


@pytest.mark.parametrize("seed", range(6))
def test_the_largest_adversarial_angle_of_a_plane_is_bracketed_on_either_side(seed: int) -> None:
    plane, beyond, star = scene(seed)
    of, size, knob = task(torch.full(SHAPE, 0.5)), abs(star), Knob("angle", 1.0, LARGEST, plane.propose)

    def bracket(attack: SurFree, angle: float) -> tuple[Any, int]:
        found, asked = drive(attack._bracket(of, plane, angle, knob), of, beyond)
        assert found is not None
        assert not found[1]
        return found[0], len(asked)

    (good, bad), _ = bracket(SurFree(), size / 3)
    assert good * star > 0
    assert [abs(good), abs(bad)] == pytest.approx([size * 2 / 3, size * 4 / 3])
    (good, bad), rows = bracket(SurFree(tries=3), size * 1.2)
    assert good * star > 0
    assert [abs(good), abs(bad)] == pytest.approx([size * 0.8, size * 1.2])
    assert rows == (3 if star > 0 else 4)
    assert bracket(SurFree(), size * 1.2) == (None, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_vertex_of_the_parabola_is_next_to_the_nearest_point(seed: int) -> None:
    plane, beyond, star = scene(seed)
    of, good = task(torch.full(SHAPE, 0.5)), 0.98 * star
    before = plane.turn(good)
    point, asked = drive(SurFree(halvings=8)._interpolate(of, plane, good, before), of, beyond)
    assert len(asked) in (9, 10)  # the bracket's width is a rounded number
    u, last = plane.turn(0.0)[0] - of.image, asked[-1].rows[0] - of.image
    angle = math.degrees(math.acos(float((u * last).sum() / u.norm() / last.norm())))
    assert angle == pytest.approx(abs(star), rel=0.25)
    assert point is not None
    assert beyond(point)
    assert torch.dist(point, of.image) <= torch.dist(before, of.image)


# The knob, redraws and refusals


def test_the_knob_is_the_least_angle_and_steps_can_be_drawn_again() -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], budget=300)
    _, asked = drive(SurFree().search(of), of, flat)
    steps = [query for query in asked if query.kind == "step"]
    assert steps
    assert all(len(query.rows) == 1 and query.redraw and query.knobs[0] is steps[0].knobs[0] for query in steps)
    the = steps[0].knobs[0]
    assert (the.name, the.high) == ("angle", 80.0)
    drawn = the.draw(25.0, 40)
    assert drawn.shape == (40, *SHAPE)
    rays = (drawn - of.image).flatten(1)
    lengths = rays.norm(dim=1)
    assert lengths.std() < 0.05 * lengths.mean()
    mean = rays.mean(dim=0)
    cosines = torch.nn.functional.cosine_similarity(rays, mean[None])
    assert cosines.mean().item() == pytest.approx(math.cos(math.radians(25)), abs=0.02)


def test_a_set_knob_holds_for_fresh_and_redrawn_rows() -> None:
    image, ray = torch.full(SHAPE, 0.5), 0.3 * unit(SHAPE, 1)[None]
    plane, of = Plane(image, image + ray, directions(image)), task(image)
    the = Knob("angle", 1.0, LARGEST, plane.propose)
    the.value = 40.0
    search = SurFree(tries=3)._bracket(of, plane, 5.0, the)
    query = next(search)

    def angle(row: Tensor) -> float:
        return math.degrees(math.acos(float(((row - image) * ray).sum() / (row - image).norm() / ray.norm())))

    assert angle(query.rows) == pytest.approx(40, abs=0.1)
    the.value = 60.0
    assert query.redraw is not None
    again = query.redraw([0])
    assert angle(again) == pytest.approx(60, abs=0.1)
    query = search.send(Answer.of(torch.tensor([0])))
    assert angle(query.rows) == pytest.approx(60, abs=0.1)
    assert torch.allclose((query.rows + again) / 2 - image, 0.25 * ray, atol=1e-5)  # in the plane that was drawn last
    with pytest.raises(StopIteration) as done:  # the smaller angles would be the same
        search.send(Answer.of(torch.tensor([0])))
    assert done.value.value == (None, False)


def test_a_refused_step_widens_the_angle_and_a_failed_one_narrows_it() -> None:
    flat = Flat(SHAPE, 0.2)
    asked = {}
    for refusing in (False, True):
        of, start = task(flat.images(1)[0], budget=200), [True]

        def told(rows: Tensor, refusing: bool = refusing, start: list[bool] = start) -> Answer:
            if len(rows) == 1 and not flat(rows).any():
                start[0] = False
            if refusing and not start[0]:
                return Answer(torch.full((len(rows),), -1), None, torch.full((len(rows),), REJECTED, dtype=torch.uint8))
            return Answer.of(flat(rows) * int(start[0]))

        _, queries = drive(SurFree().search(of), of, told)
        asked[refusing] = [query.rows for query in queries if query.kind == "step"]
    image = flat.images(1)[0]

    def spread(rows: list[Tensor]) -> float:
        """The angle between the two senses of a plane."""
        a, b = ((row - image).flatten() for row in rows)
        return float(torch.acos(torch.nn.functional.cosine_similarity(a, b, dim=0).clamp(-1, 1)))

    assert spread(asked[False][-4:-2]) < 0.5 * spread(asked[False][:2])
    assert spread(asked[True][40:42]) > 1.5 * spread(asked[True][:2])


def test_one_refusal_does_not_stop_it() -> None:
    """Fault 4.1 of the OARS reference: there a single refused row ended all progress."""
    flat, count = Flat(SHAPE, 0.2), [0]

    def gate(rows: Tensor) -> Answer:
        count[0] += len(rows)
        answer = Answer.of(flat(rows))
        if count[0] - len(rows) < 57 <= count[0]:
            answer.status[57 - count[0] - 1] = REJECTED
        return answer

    of = task(flat.images(1)[0], budget=600)
    _, asked = drive(SurFree().search(of), of, gate)
    rows = torch.cat([query.rows for query in asked])
    hits = torch.where(flat(rows).bool(), (rows - of.image).flatten(1).norm(dim=1), torch.inf)
    assert hits.min() < 0.7 * hits[:60].min()


# Distances


@pytest.mark.parametrize(
    ("options", "figure"), [({}, 1.15), ({"basis": "dct", "tries": 3}, 1.4), ({"interpolate": True}, 1.25)], ids=str
)
def test_distance_over_the_optimum_of_a_half_space(options: dict[str, Any], figure: float) -> None:
    """All frequencies, or the plane's normal could not be reached. The limits at 5000 rows stand in the table."""
    flat = Flat(SHAPE, 0.2)
    result = run_attack(flat, flat.images(4), [0] * 4, attack=SurFree(frequencies=1.0, **options), budget=1000)
    assert np.median(result.distance) <= figure * 0.2
    assert (result.distance >= 0.2).all()
    assert flat.rows == sum(result.ledger.values())
    assert flat(result.adversarials).all()


def test_orthogonality_pays_on_a_plane() -> None:
    """With it the normal is learnt direction by direction, as by coordinate descent; without, at random."""
    flat = Flat(SHAPE, 0.2)
    with_memory, without = (
        run_attack(flat, flat.images(4), [0] * 4, attack=SurFree(frequencies=1.0, memory=memory), budget=500).distance
        for memory in (100, 0)
    )
    assert np.median(with_memory) * 1.05 < np.median(without)


def test_targets_are_reached_through_the_pool() -> None:
    flat = Flat(SHAPE, 0.2)

    def model(rows: Tensor) -> Tensor:
        """Beyond a plane lies class 2 where the first pixel is bright, else class 1."""
        return flat(rows) * torch.where(rows[:, 0, 0, 0] > 0.7, 2, 1)

    pool = ((0.5 + 3 * flat.normal).clamp(0, 1).expand(3, -1, -1, -1).clone(), torch.tensor([1, 2, 2]))
    pool[0][:, 0, 0, 0] = torch.tensor([0.1, 0.9, 0.9])
    result = run_attack(model, flat.images(3), [0] * 3, attack=SurFree(), targets=2, pool=pool, budget=1000)
    assert (model(result.adversarials) == 2).all()
    assert (result.distance < 0.6).all()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("angle", 90.0, "angle must be positive and at most 80 degrees, got 90.0"),
        ("rho", 0.0, "rho must be positive and at most 1, got 0.0"),
        ("frequencies", 1.5, "frequencies must be positive and at most 1, got 1.5"),
        ("tries", 0, "tries must be at least 1, got 0"),
        ("halvings", -1, "halvings must be at least 0, got -1"),
        ("basis", "dst", "unknown basis 'dst'"),
        ("weights", "tan", "unknown weights 'tan': did you mean tanh"),
    ],
)
def test_bad_options_are_refused_in_one_line(option: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        SurFree(**{option: value})  # type: ignore[arg-type]
