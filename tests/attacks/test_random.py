"""Random search: the right distance in every norm, inside the ball, blind to everything but the radius."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox import run_attack
from robustbox.attacks.bandits import Bandits
from robustbox.attacks.bayes_subspace import BayesSubspace
from robustbox.attacks.cgba import CGBA
from robustbox.attacks.nes import NES
from robustbox.attacks.random import RandomSearch, Rays
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import NORMS, Attack, Norm
from tests.attacks.analytic import Flat, check_box, drive, task

EPSILON: dict[Norm, float] = {"l0": 7, "l2": 0.6, "linf": 8 / 255}


@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 14)])
def test_with_epsilon_every_row_is_in_the_ball_and_uses_it(
    shape: tuple[int, int, int], norm: Norm, levels: int | None
) -> None:
    image = torch.randint(40, 216, shape, generator=torch.Generator().manual_seed(0)) / 255
    of = task(image, norm=norm, epsilon=EPSILON[norm], budget=95, levels=levels)
    _, asked = drive(RandomSearch().search(of), of, lambda rows: torch.zeros(len(rows)).long())
    rows = torch.cat([query.rows for query in asked])
    far = distance(rows - image, norm)
    assert len(rows) == 90
    assert far.max() <= EPSILON[norm] * (1 + 1e-5)
    assert far.median() >= EPSILON[norm] * (0.99 if levels and norm == "l2" else 0.999)
    assert len({row.numpy().tobytes() for row in rows}) == 90
    if levels and norm == "l2":  # rounding on the way to the model changes nothing more
        assert torch.allclose(rows * 255, (rows * 255).round(), atol=1e-3)


@pytest.mark.parametrize("epsilon", [0.1, 0.15])
@pytest.mark.parametrize("attack", [RandomSearch(), NES(), Bandits(), BayesSubspace(objective="margin")])
def test_a_ball_of_less_than_a_grey_level_a_value_is_used_too(attack: Attack, epsilon: float) -> None:
    """All rows of rays: those of other attacks as well, which stand at the edge of the ball sooner or later."""
    image = torch.randint(40, 216, (1, 3, 24, 24), generator=torch.Generator().manual_seed(0)) / 255
    seen = []

    def model(rows: Tensor) -> Tensor:
        seen.append(rows.clone())
        return torch.stack([1 + rows.flatten(1).mean(1), rows.flatten(1)[:, 0]], dim=1)

    run_attack(model, image, [0], attack=attack, norm="l2", epsilon=epsilon, budget=60, levels=256)
    far = distance(torch.cat(seen)[1:61] - image, "l2")
    assert far.max() <= epsilon * (1 + 1e-5)
    assert far.median() >= 0.9 * epsilon


def test_in_linf_values_of_a_ray_are_rounded_to_the_nearest_level_in_the_ball() -> None:
    deltas = torch.tensor([1.0, -0.7, 0.2, -0.34]).view(1, 1, 2, 2)
    of = task(torch.full((1, 2, 2), 0.6), norm="linf", levels=256)
    one = torch.ones(1)
    rows = Rays(of, deltas, None, one, one, None).at(4.9 / 255)
    moved = (rows * 255).round() - 153
    assert moved.flatten().tolist() == [4, -3, 1, -2]


def test_l0_changes_whole_pixels_to_corners_of_the_colour_cube() -> None:
    image = torch.full((3, 8, 8), 0.4)
    of = task(image, norm="l0", epsilon=5.9, budget=200)
    _, asked = drive(RandomSearch().search(of), of, lambda rows: torch.zeros(len(rows)).long())
    rows = torch.cat([query.rows for query in asked])
    changed = (rows != image).any(dim=1)
    assert (changed.flatten(1).sum(1) == 5).all()
    colours = rows.permute(0, 2, 3, 1)[changed]
    assert len(colours.unique(dim=0)) == 8
    assert torch.equal(colours, colours.round())
    assert changed.any(dim=0).all()  # every position gets its turn


@pytest.mark.parametrize(("norm", "optimum"), [("l2", 0.4 * 8**0.5), ("linf", 0.4), ("l0", 4.0)])
def test_without_epsilon_the_distance_falls_towards_the_optimum(norm: Norm, optimum: float) -> None:
    """Adversarial when the eight values of an image have a sum of 2 x 1.6 more: small enough for blind search."""

    def model(rows: Tensor) -> Tensor:
        check_box(rows)
        return (rows.flatten(1).sum(1) > 3.19).long()

    result = run_attack(model, torch.zeros(2, 1, 2, 4), [0, 0], attack="random", norm=norm, budget=3000, seed=1)
    assert (result.distance >= optimum * 0.99).all()
    assert (result.distance <= optimum * 1.3).all()
    assert (model(result.adversarials) == 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_targets_are_reached_through_the_pool(norm: Norm) -> None:
    goal = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(3))
    image = 1 - goal

    def model(rows: Tensor) -> Tensor:
        return torch.where((rows - goal).abs().flatten(1).mean(1) < 0.2, 2, 0)

    settings = {"attack": "random", "norm": norm, "targets": 2, "budget": 200}
    assert not run_attack(model, image[None], [0], **settings).success.any()  # type: ignore[arg-type]
    pool = (torch.stack([image.flip(2), goal]), [1, 2])
    found = run_attack(model, image[None], [0], pool=pool, **settings)  # type: ignore[arg-type]
    assert found.success.all()
    assert found.distance[0] < float(distance((goal - image)[None], norm)) * (1.001 if norm != "l0" else 1)


@pytest.mark.parametrize("epsilon", [None, 1.0])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_an_image_of_the_pool_is_asked_once_at_a_radius(norm: Norm, epsilon: float | None) -> None:
    image = torch.full((1, 6, 6), 0.5)
    pool = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 2

    def toward(budget: int, **fields: bool) -> list[int]:
        of = task(image, norm=norm, epsilon=epsilon, budget=budget, target=1, pool=pool, **fields)
        _, asked = drive(RandomSearch().search(of), of, lambda rows: torch.zeros(len(rows)).long())
        rows = torch.cat([query.rows for query in asked]) - image
        likeness = F.cosine_similarity(rows.flatten(1)[:, None], (pool[0] - image).flatten(1)[None], dim=2)
        return (likeness > 0.999).sum(dim=0).tolist()

    assert toward(100) == [0, 1] * 6
    assert sum(toward(100, stochastic=True)) == 50


def test_after_a_success_rows_on_grey_levels_are_a_level_nearer() -> None:
    image = torch.full((1, 3, 3), 6 / 11)
    for levels in range(1, 5):
        of = task(image, norm="linf", budget=200, levels=12)
        _, asked = drive(
            RandomSearch().search(of), of, lambda rows, k=levels: (rows - image).abs().amax((1, 2, 3)) * 11 > k + 0.5
        )
        steps = [
            round(float(distance(query.rows - image, "linf").max()) * 11) for query in asked if query.kind == "probe"
        ]
        assert set(steps[1:]) == {levels}


def test_it_is_blind_where_cgba_is_not() -> None:
    flat = Flat((3, 8, 8), 0.2)
    images = flat.images(4)
    blind, seeing = (run_attack(flat, images, [0] * 4, attack=a, budget=500) for a in (RandomSearch(), CGBA()))
    assert np.median(seeing.distance) < 0.3
    assert np.median(blind.distance) > 0.6


def test_answers_do_not_change_rows_within_the_ball() -> None:
    images = []
    for label in (0, 1):
        of = task(torch.full((1, 5, 5), 0.5), norm="linf", epsilon=0.1, budget=50)
        _, asked = drive(RandomSearch().search(of), of, lambda rows, label=label: torch.full((len(rows),), label))
        images.append(torch.cat([query.rows for query in asked]))
    assert torch.equal(*images)


@pytest.mark.parametrize("norm", NORMS)
def test_it_ends_when_nothing_is_left_to_gain(norm: Norm) -> None:
    of = task(torch.full((1, 4, 4), 0.5), norm=norm, budget=5000)
    _, asked = drive(RandomSearch().search(of), of, lambda rows: torch.ones(len(rows)).long())
    assert of.remaining > 4000
    assert asked


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [1, 2, 7, 100])
def test_budgets_are_spent_to_the_row(norm: Norm, budget: int) -> None:
    flat = Flat((3, 8, 8), 5.0)
    for epsilon in (None, EPSILON[norm]):
        result = run_attack(flat, flat.images(2), [0, 0], attack="random", norm=norm, epsilon=epsilon, budget=budget)
        assert (result.queries == budget).all()
        assert not result.success.any()
    assert flat.rows == 2 * 2 * (budget + 1)


@pytest.mark.parametrize(("option", "value"), [("batch", 0), ("factor", 0.0), ("tolerance", 1.0)])
def test_bad_options_are_refused_in_one_line(option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{option} must be .*, got {value}$"):
        RandomSearch(**{option: value})
