"""ZO-signSGD: its three estimates, its descent and its books."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.zo_sign_sgd import ZOSignSGD, sphere
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer
from tests.attacks.analytic import drive, task
from tests.attacks.slopes import Slope, flat_scores

SHAPE = (3, 4, 4)
DIFFERENCES = ("forward", "central", "vote")


def constant(rows: Tensor) -> Answer:
    return Answer.of(torch.zeros(len(rows)).long(), flat_scores(rows))


def first_step(attack: ZOSignSGD, model: Slope) -> tuple[Tensor, Tensor]:
    """The probes of the first estimate and the sign of the first step that came of them."""
    of = task(model.images(1)[0], norm="linf", epsilon=0.3, budget=attack.directions * 2 + 1)
    _, asked = drive(attack.search(of), of, model.answer)
    probes = torch.cat([query.rows for query in asked if query.kind == "probe"]) - of.image
    (step,) = [query.rows for query in asked if query.kind == "step"][:1]
    return probes, (step[0] - of.image).sign()


def test_directions_are_uniform_on_the_sphere() -> None:
    u = sphere(task(torch.zeros(1, 4, 4)))(4000).flatten(1)
    assert torch.allclose(u.square().mean(1), torch.ones(4000), atol=1e-5)
    assert u.mean(0).abs().max() < 4 / 4000**0.5
    assert (u.T @ u / 4000 - torch.eye(16)).abs().max() < 0.1


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_the_first_step_goes_against_the_sign_of_the_estimate(difference: Any) -> None:
    """Worked out from the probes: the loss is -2 w x + const, so a probe's rise is -2 w times its offset."""
    model = Slope(SHAPE, 0.1)
    probes, sign = first_step(ZOSignSGD(difference=difference), model)
    rises = (probes * -2 * model.normal).sum(dim=(1, 2, 3), keepdim=True)
    if difference == "central":
        assert torch.allclose(probes[0::2], -probes[1::2], atol=1e-6)
        expected = -(rises * probes).mean(0)
    else:
        summands = (rises - rises.mean()) * probes  # the image itself was not asked: the mean stands for it
        expected = -(summands.sign() if difference == "vote" else summands).mean(0)
    clear = expected.abs() > 0.4 * expected.abs().max()
    assert clear.float().mean() > 0.25
    assert torch.equal(sign[clear], expected.sign()[clear])


def test_later_estimates_measure_from_the_answered_iterate() -> None:
    """A loss that rises for the iterate alone pushes the step against the sum of all directions."""
    of = task(torch.full(SHAPE, 0.5), norm="linf", epsilon=0.3, budget=10**6)
    search = ZOSignSGD(directions=3).search(of)
    query = search.send(constant(next(search).rows))
    assert query.kind == "step"
    high = Answer.of(torch.zeros(1).long(), torch.tensor([[9.0, 0.0, 0.0]]))
    centre, query = query.rows, search.send(high)
    noise = (query.rows - centre).sum(0)
    step = search.send(constant(query.rows)).rows
    assert torch.equal((step - centre)[0].sign(), noise.sign())  # the probes' losses are lower, wherever they went


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_it_succeeds_a_quarter_above_the_optimum_and_not_below_it(difference: Any) -> None:
    model = Slope(SHAPE, 0.1)
    for factor, wins in ((1.25, True), (0.99, False)):
        settings = {"norm": "linf", "epsilon": factor * model.optimum("linf"), "budget": 2500 if wins else 300}
        attack = ZOSignSGD(difference=difference)
        result = run_attack(model, model.images(2), [0, 0], attack=attack, **settings)  # type: ignore[arg-type]
        assert (result.success == wins).all()


def test_it_reaches_a_target() -> None:
    model = Slope(SHAPE, 0.1, classes=3)
    settings = {"norm": "linf", "epsilon": 1.5 * model.optimum("linf"), "targets": 1, "budget": 2000}
    result = run_attack(model, model.images(2), [0, 0], attack="zo-sign-sgd", **settings)  # type: ignore[arg-type]
    assert result.success.all()
    assert (model(result.adversarials).argmax(1) == 1).all()


@pytest.mark.parametrize(("difference", "probes"), [("forward", 5), ("central", 10), ("vote", 5)])
def test_an_iteration_costs_its_probes_and_one(difference: Any, probes: int) -> None:
    of = task(torch.full(SHAPE, 0.5), norm="linf", epsilon=0.1, budget=4 * (probes + 1))
    _, asked = drive(ZOSignSGD(5, difference=difference).search(of), of, constant)
    assert [(query.kind, len(query.rows)) for query in asked] == [("probe", probes), ("step", 1)] * 4
    assert (asked[0].groups is None) == (difference != "central")


def test_steps_shrink_with_the_root_of_the_iteration() -> None:
    model = Slope(SHAPE, 9.0)
    of = task(model.images(1)[0], norm="linf", epsilon=0.3, budget=6 * 9)
    _, asked = drive(ZOSignSGD(5, step=0.05).search(of), of, model.answer)
    iterates = torch.cat([of.image[None], *[query.rows for query in asked if query.kind == "step"]])
    lengths = iterates.diff(dim=0).abs().flatten(1).median(dim=1).values
    assert torch.allclose(lengths, 0.05 / torch.arange(1, 10).sqrt(), rtol=1e-3)


@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("sigma", [0.001, 0.3])
def test_every_row_is_in_the_ball_after_rounding(levels: int | None, sigma: float) -> None:
    model = Slope(SHAPE, 0.3)
    for image in (model.images(1)[0], torch.zeros(SHAPE), torch.ones(SHAPE)):
        image = (image * 255).round() / 255
        of = task(image, norm="linf", epsilon=8.4 / 255, budget=155, levels=levels)
        _, asked = drive(ZOSignSGD(sigma=sigma).search(of), of, model.answer)
        rows = torch.cat([query.rows for query in asked])
        far = distance((rows * 255).round() / 255 - image if levels else rows - image, "linf")
        assert 6 / 255 <= far.max() <= 8.4 / 255 * (1 + 1e-5)


@pytest.mark.parametrize("budget", [1, 7, 100])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_and_constant_scores_use_the_budget_to_the_row(budget: int, value: float) -> None:
    image = torch.full((1, *SHAPE), value)
    result = run_attack(flat_scores, image, [0], attack="zo-sign-sgd", norm="linf", epsilon=0.1, budget=budget)
    assert result.errors == [None]
    assert result.queries.tolist() == [budget]


def test_refused_probes_are_left_out_and_a_refused_iterate_is_given_up() -> None:
    model = Slope(SHAPE, 9.0)
    of = task(model.images(1)[0], norm="linf", epsilon=0.3, budget=10**6)
    search = ZOSignSGD(4).search(of)
    query = next(search)
    answer = model.answer(query.rows)
    assert answer.scores is not None
    answer.status[1], answer.labels[1], answer.scores[1] = REJECTED, -1, torch.nan
    kept = (query.rows - of.image)[[0, 2, 3]]
    rises = (kept * -2 * model.normal).sum(dim=(1, 2, 3), keepdim=True)
    expected = -((rises - rises.mean()) * kept).sum(0)
    query = search.send(answer)
    assert ((query.rows[0] - of.image).sign() == expected.sign()).float().mean() > 0.95
    refused = Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8))
    query = search.send(refused)
    assert (query.rows - of.image).abs().max() < 0.01  # probes around the image again
    query = search.send(model.answer(query.rows))
    assert float((query.rows - of.image).abs().median()) == pytest.approx(2 * 0.1 / 2**0.5, rel=1e-3)


def test_knobs_are_offered_and_drawn_from_where_it_stands() -> None:
    of = task(torch.full((3, 16, 16), 0.5), norm="linf", epsilon=0.2, budget=10**6)
    query = next(ZOSignSGD().search(of))
    assert [knob.name for knob in query.knobs] == list(ZOSignSGD.knobs)
    sigma, step = query.knobs
    assert torch.allclose(
        (sigma.draw(0.02, 5) - 0.5).square().mean(dim=(1, 2, 3)).sqrt(), torch.tensor(0.02), rtol=1e-3
    )
    assert torch.allclose((step.draw(0.05, 5) - 0.5).abs(), torch.tensor(0.05), rtol=1e-3)
    assert step.high == 0.2
    assert query.redraw is not None
    fresh = query.redraw([3, 0])
    assert fresh.shape == (2, 3, 16, 16)
    assert not torch.equal(fresh, query.rows[[3, 0]])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"directions": 0}, "directions must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"step": -1.0}, "step must be positive, got -1.0"),
        ({"difference": "centre"}, "unknown difference 'centre': did you mean central"),
        ({"loss": "margn"}, "did you mean margin"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        ZOSignSGD(**options)
