"""Bandits-TD: its prior learns which way the loss falls, tile by tile, from two rows a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.bandits import Bandits
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Norm
from tests.attacks.analytic import drive, task
from tests.attacks.slopes import Slope, flat_scores

NORMS: tuple[Norm, ...] = ("linf", "l2")
SHAPE = (3, 4, 4)


def constant(rows: Tensor) -> Answer:
    return Answer.of(torch.zeros(len(rows)).long(), flat_scores(rows))


def centre(rows: Tensor) -> Tensor:
    """Where the first pair stands: its prior is 0, so that its rows lie opposite each other."""
    return rows.mean(0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("better", [0, 1])
def test_the_first_step_goes_to_the_side_of_the_pair_where_the_loss_is_lower(norm: Norm, better: int) -> None:
    of = task(torch.full((3, 6, 6), 0.5), norm=norm, epsilon=0.2, budget=10**6)
    search = Bandits(tile=2).search(of)
    query = next(search)
    pair = query.rows - of.image
    assert torch.allclose(pair[0], -pair[1], atol=1e-6)
    assert torch.allclose(distance(pair, "l2"), torch.tensor(0.002 * 108**0.5).double(), rtol=1e-3)
    assert query.groups == (0, 0)
    scores = torch.zeros(2, 2)
    scores[1 - better, 0] = 1.0  # class 0 is more likely there: a higher loss
    query = search.send(Answer.of(torch.zeros(2).long(), scores))
    offset = centre(query.rows) - of.image
    along = pair[better]
    if norm == "linf":
        assert torch.allclose(offset, 0.04 * along.sign(), atol=0.012)
    else:
        assert torch.allclose(offset / offset.norm(), along / along.norm(), atol=0.15)
        assert float(offset.norm()) == pytest.approx(0.02 + 0.002 * 108**0.5, rel=0.02)  # both rows lie ahead along v


@pytest.mark.parametrize(("tile", "size"), [(1, (5, 7)), (2, (5, 7)), (3, (6, 6)), (9, (6, 6))])
def test_rows_are_constant_on_tiles(tile: int, size: tuple[int, int]) -> None:
    of = task(torch.full((2, *size), 0.5), norm="l2", epsilon=1.0, budget=40)
    _, asked = drive(Bandits(tile=tile).search(of), of, lambda rows: Answer.of(torch.zeros(2).long(), torch.rand(2, 2)))
    cells = -(-size[0] // tile) * -(-size[1] // tile)
    assert len(asked) == 20
    for query in asked:
        values = query.rows.permute(0, 2, 3, 1).flatten(1, 2).mul(1e6).round()
        assert max(len(row.unique(dim=0)) for row in values) <= cells
    if tile == 1:
        assert len(values[0].unique(dim=0)) == size[0] * size[1]


@pytest.mark.parametrize(("side", "cells"), [(8, 64), (15, 225), (16, 64), (32, 256)])
def test_tiles_are_of_two_pixels_where_the_image_is_large_enough(side: int, cells: int) -> None:
    of = task(torch.full((1, side, side), 0.5), norm="l2", epsilon=1.0, budget=40)
    query = next(Bandits().search(of))
    assert len(query.rows[0].unique()) == cells


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tile", [1, 2])
def test_it_succeeds_a_quarter_above_the_optimum_of_the_tiles_and_not_below_it(norm: Norm, tile: int) -> None:
    """On a plane whose normal is constant on tiles, tiles lose nothing."""
    model = Slope(SHAPE, 0.1)
    if tile > 1:
        cells = torch.nn.functional.avg_pool2d(model.normal, tile)
        model.normal = cells.repeat_interleave(tile, 1).repeat_interleave(tile, 2)
        model.normal /= model.normal.norm()
    for factor, wins in ((1.25, True), (0.99, False)):
        settings = {"norm": norm, "epsilon": factor * model.optimum(norm), "budget": 1500 if wins else 100}
        result = run_attack(model, model.images(1), [0], attack=Bandits(tile=tile), **settings)  # type: ignore[arg-type]
        assert result.success.all() == wins


@pytest.mark.parametrize("norm", NORMS)
def test_the_prior_remembers(norm: Norm) -> None:
    """After 200 steps on a plane it points along the plane's normal, far better than one pair can tell."""
    model = Slope(SHAPE, 9.0)
    of = task(model.images(1)[0], norm=norm, epsilon=0.2, budget=400)
    _, asked = drive(Bandits(tile=1).search(of), of, model.answer)
    offset = centre(asked[-1].rows) - of.image
    cosine = float((offset * model.normal).sum() / offset.norm())
    assert cosine > (0.7 if norm == "linf" else 0.8)


@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_a_target(norm: Norm) -> None:
    model = Slope(SHAPE, 0.1, classes=3)
    settings = {"norm": norm, "epsilon": 1.5 * model.optimum(norm), "targets": 1, "budget": 1500}
    result = run_attack(model, model.images(2), [0, 0], attack=Bandits(tile=1), **settings)  # type: ignore[arg-type]
    assert result.success.all()
    assert (model(result.adversarials).argmax(1) == 1).all()


@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sigma", [0.002, 0.3])
def test_every_row_is_in_the_ball_after_rounding(norm: Norm, levels: int | None, sigma: float) -> None:
    model = Slope(SHAPE, 0.3)
    for image in (model.images(1)[0], torch.zeros(SHAPE), torch.ones(SHAPE)):
        image = (image * 255).round() / 255
        epsilon = 8.4 / 255 if norm == "linf" else 0.2
        of = task(image, norm=norm, epsilon=epsilon, budget=150, levels=levels)
        _, asked = drive(Bandits(sigma=sigma).search(of), of, model.answer)
        rows = torch.cat([query.rows for query in asked])
        far = distance((rows * 255).round() / 255 - image if levels else rows - image, norm)
        assert 0.7 * epsilon <= far.max() <= epsilon * (1 + 1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [1, 7, 100])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_and_constant_scores_use_the_budget_to_the_row(norm: Norm, budget: int, value: float) -> None:
    image = torch.full((1, *SHAPE), value)
    result = run_attack(flat_scores, image, [0], attack="bandits", norm=norm, epsilon=0.1, budget=budget)
    assert result.errors == [None]
    assert result.queries.tolist() == [budget]


@pytest.mark.parametrize("refused", [[0], [1], [0, 1]])
def test_after_a_refused_pair_it_stays_and_draws_another(refused: list[int]) -> None:
    of = task(torch.full(SHAPE, 0.5), norm="linf", epsilon=0.2, budget=10**6)
    search = Bandits().search(of)
    query = next(search)
    status = torch.zeros(2, dtype=torch.uint8)
    status[refused] = REJECTED
    again = search.send(Answer(torch.where(status > 0, -1, 0), torch.rand(2, 2), status))
    assert torch.allclose(centre(again.rows), of.image, atol=1e-6)
    assert not torch.allclose(again.rows, query.rows)


def test_a_redrawn_pair_is_the_one_that_teaches() -> None:
    of = task(torch.full((3, 6, 6), 0.5), norm="linf", epsilon=0.2, budget=10**6)
    search = Bandits().search(of)
    query = next(search)
    assert query.redraw is not None
    query.knobs[0].value = 0.01
    fresh = query.redraw([0, 1])
    assert torch.allclose(distance(fresh - of.image, "l2"), torch.tensor(0.01 * 108**0.5).double(), rtol=1e-3)
    query.knobs[0].value = 0.002
    moved = centre(search.send(Answer.of(torch.zeros(2).long(), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))).rows)
    assert torch.allclose(moved - of.image, 0.04 * (fresh[0] - of.image).sign(), atol=0.012)


@pytest.mark.parametrize("norm", NORMS)
def test_knobs_scale_probes_and_steps(norm: Norm) -> None:
    of = task(torch.full(SHAPE, 0.5), norm=norm, epsilon=0.4, budget=10**6)
    search = Bandits().search(of)
    query = next(search)
    assert [knob.name for knob in query.knobs] == list(Bandits.knobs)
    sigma, step = query.knobs
    lengths = distance(sigma.draw(0.01, 5) - 0.5, "l2")
    assert torch.allclose(lengths, torch.tensor(0.01 * 48**0.5).double(), rtol=1e-3)
    assert torch.allclose(distance(step.draw(0.1, 5) - 0.5, norm), torch.tensor(0.1).double(), rtol=1e-3)
    step.value = 0.1
    query = search.send(Answer.of(torch.zeros(2).long(), torch.tensor([[0.0, 0.0], [1.0, 0.0]])))
    assert float(distance(centre(query.rows)[None] - of.image, norm)) == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"step": -1.0}, "step must be positive, got -1.0"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"exploration": float("nan")}, "exploration must be positive, got nan"),
        ({"loss": "margn"}, "did you mean margin"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        Bandits(**options)
