"""NES: its gradient, its descent, its books, and its two poorer threat models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.estimators import Ball, Prober, Walk, gaussian
from robustbox.attacks.losses import losses
from robustbox.attacks.nes import NES
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Norm, Query, Task
from tests.attacks.analytic import drive, task
from tests.attacks.slopes import Slope

NORMS: tuple[Norm, ...] = ("linf", "l2")
SHAPE = (3, 4, 4)


def constant(rows: Tensor) -> Answer:
    return Answer.of(torch.zeros(len(rows)).long(), torch.tensor([0.7, 0.3]).expand(len(rows), 2))


def prober(of: Task, **options: Any) -> Prober:
    return Prober(of, gaussian(of), 0.001, lambda answer: losses(of, answer, "margin"), **options)


# The estimate.


@pytest.mark.parametrize("paired", [True, False])
def test_the_estimate_is_the_gradient_of_a_linear_loss(paired: bool) -> None:
    """Of g_hat = mean u (u g), the part along g has mean |g|, and the rest has squared length |g|^2 (d - 1) / n."""
    model, n = Slope(SHAPE, 0.1), 2000
    of = task(model.images(1)[0], norm="l2", epsilon=1.0)
    walk = Walk(of, Ball(of, 1.0), of.image[None])
    of.remaining = 10**6
    base = None if paired else losses(of, model.answer(of.image[None]), "margin")[0]
    found, asked = drive(prober(of, paired=paired).estimate(walk, n, base), of, model.answer)
    assert found is not None
    gradient = -2 * model.normal  # the loss is the margin of class 0
    along = float((found.gradient * gradient).sum() / 4)
    rest = float((found.gradient - along * gradient).square().sum() / 4)
    assert along == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert rest == pytest.approx(47 / n, rel=0.7)
    assert sum(len(query.rows) for query in asked) == n * (1 + paired)


def test_pairs_are_antithetic_and_pairs_of_which_a_row_is_refused_are_left_out() -> None:
    model = Slope(SHAPE, 0.1)
    of = task(model.images(1)[0], norm="linf", epsilon=0.1)
    walk = Walk(of, Ball(of, 0.1), of.image[None])

    def answers(rows: Tensor) -> Answer:
        answer = model.answer(rows)
        answer.status[[1, 4, 6, 7]] = REJECTED  # of pairs 0, 2 and 3
        assert answer.scores is not None
        answer.scores[[1, 4, 6, 7]] = torch.nan
        return answer

    found, asked = drive(prober(of).estimate(walk, 5), of, answers)
    (query,) = asked
    noise = (query.rows - of.image) / 0.001
    assert torch.allclose(noise[0::2], -noise[1::2], atol=1e-3)
    assert 0.8 < float(noise.std()) < 1.2
    assert query.groups == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    assert found is not None
    kept = noise[[2, 8]]
    expected = torch.stack([(u * -2 * model.normal).sum() * u for u in kept]).mean(0)
    assert torch.allclose(found.gradient[0], expected, rtol=0.02, atol=0.05)


def test_without_answers_there_is_no_gradient_and_no_nan() -> None:
    model = Slope(SHAPE, 0.1)
    for name, options in (("linf", {}), ("l2", {})):
        of = task(model.images(1)[0], norm=name, epsilon=0.1, budget=200)  # type: ignore[arg-type]

        def refuse(rows: Tensor) -> Answer:
            return Answer(torch.full((len(rows),), -1), torch.zeros(len(rows), 2), torch.ones(len(rows)).byte())

        _, asked = drive(NES(**options).search(of), of, refuse)
        assert sum(len(query.rows) for query in asked) > 170


@pytest.mark.parametrize("paired", [True, False])
def test_redrawn_rows_are_what_the_estimate_counts(paired: bool) -> None:
    model, width = Slope(SHAPE, 0.1), 1 + paired
    of = task(model.images(1)[0], norm="l2", epsilon=9.0)
    walk = Walk(of, Ball(of, 9.0), of.image[None])
    probes = prober(of, paired=paired)
    estimate = probes.estimate(walk, 3, torch.tensor(0.0))
    query = next(estimate)
    assert query.redraw is not None
    before = query.rows.clone()
    probes.knob.value = 0.01
    positions = list(range(width, 2 * width))  # all of draw 1
    fresh = query.redraw(positions)
    assert torch.equal(query.rows, before)
    assert not torch.allclose(fresh, before[positions])
    loss = torch.zeros(len(before))
    loss[positions[0]] = 1.0  # the sum is then u of draw 1 alone
    with pytest.raises(StopIteration) as done:
        estimate.send(Answer.of(torch.zeros(len(before)).long(), torch.stack([loss / 2, -loss / 2], 1)))
    u = (fresh[0] - of.image) / 0.01
    # margin 1, over sigma (pairs: 2 sigma), over 3 draws
    assert torch.allclose(done.value.value.gradient[0], u / (0.01 * width) / 3, rtol=0.01, atol=0.1)


def test_noise_that_is_not_held_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Slope(SHAPE, 0.1)
    estimates = []
    for limit in (2**20, 0):
        monkeypatch.setattr("robustbox.attacks.noise.HELD_BYTES", limit)
        of = task(model.images(1)[0], norm="linf", epsilon=0.1)
        estimate = prober(of).estimate(Walk(of, Ball(of, 0.1), of.image[None]), 4)
        query = next(estimate)
        rows = query.rows.clone()
        assert query.redraw is not None
        rows[2:4] = query.redraw([2, 3])
        with pytest.raises(StopIteration) as done:
            estimate.send(model.answer(rows))
        estimates.append(done.value.value.gradient)
        torch.rand(3, generator=of.generator)  # and the stream goes on from where it was
    assert torch.equal(*estimates)


# The descent.


@pytest.mark.parametrize("norm", NORMS)
def test_it_succeeds_at_a_fifth_above_the_optimum_and_not_below_it(norm: Norm) -> None:
    model = Slope(SHAPE, 0.1)
    images = model.images(3)
    for factor, wins in ((1.25, True), (0.99, False)):
        epsilon = factor * model.optimum(norm)
        result = run_attack(model, images, [0] * 3, attack="nes", norm=norm, epsilon=epsilon, budget=800)
        assert (result.success == wins).all()
        assert wins or (result.queries == 800).all()


@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_a_target(norm: Norm) -> None:
    model = Slope(SHAPE, 0.1, classes=4)
    epsilon = 1.5 * model.optimum(norm)
    result = run_attack(model, model.images(2), [0, 0], attack="nes", norm=norm, epsilon=epsilon, targets=1, budget=800)
    assert result.success.all()
    assert (model(result.adversarials).argmax(1) == 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_an_iteration_costs_two_rows_a_pair_and_one(norm: Norm) -> None:
    of = task(torch.full(SHAPE, 0.5), norm=norm, epsilon=0.1, budget=7 * 5)
    _, asked = drive(NES(pairs=3).search(of), of, constant)
    assert [(query.kind, len(query.rows)) for query in asked] == [("probe", 6), ("step", 1)] * 5


@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sigma", [0.001, 0.3])
def test_every_row_is_in_the_ball_after_rounding(norm: Norm, levels: int | None, sigma: float) -> None:
    model = Slope(SHAPE, 0.3)
    for image in (model.images(1)[0], torch.zeros(SHAPE), torch.ones(SHAPE)):
        image = (image * 255).round() / 255
        epsilon = 8.4 / 255 if norm == "linf" else 0.2
        of = task(image, norm=norm, epsilon=epsilon, budget=210, levels=levels)
        _, asked = drive(NES(sigma=sigma).search(of), of, model.answer)
        rows = torch.cat([query.rows for query in asked])
        sent = (rows * 255).round() / 255 if levels else rows
        far = distance(sent - image, norm)
        assert far.max() <= epsilon * (1 + 1e-5)
        assert far.max() >= 0.8 * epsilon  # and the ball is used
        assert far[far > 0].min() > 1e-4


def test_the_step_is_halved_when_the_loss_no_longer_falls() -> None:
    """Losses that only rise: the step falls from epsilon / 5 to 1/200 of that, and no further."""
    of = task(torch.full((1, 8, 8), 0.5), norm="linf", epsilon=0.1, budget=3 * 30)
    rising = iter(range(10**6))

    def answers(rows: Tensor) -> Answer:
        loss = torch.tensor([float(next(rising)) for _ in rows])
        return Answer.of(torch.zeros(len(rows)).long(), torch.stack([loss, -loss], 1))

    _, asked = drive(NES(pairs=1, plateau=2, momentum=0.0).search(of), of, answers)
    steps = torch.cat([of.image[None], *[query.rows for query in asked if query.kind == "step"]]).diff(dim=0)
    lengths = steps.abs().flatten(1).median(dim=1).values  # values at the sphere stay behind
    assert lengths[0] == pytest.approx(0.02, rel=1e-3)
    assert lengths[4] == pytest.approx(0.005, rel=1e-2)
    assert lengths[-1] == pytest.approx(0.02 / 200, rel=1e-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("budget", [1, 7, 100])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_and_constant_scores_use_the_budget_to_the_row(norm: Norm, budget: int, value: float) -> None:
    def model(rows: Tensor) -> Tensor:
        return torch.tensor([2.0, 1.0]).expand(len(rows), 2)

    result = run_attack(model, torch.full((1, *SHAPE), value), [0], attack="nes", norm=norm, epsilon=0.1, budget=budget)
    assert result.errors == [None]
    assert result.queries.tolist() == [budget]


# Knobs and refusals.


def test_the_knob_sigma_scales_probes_and_its_draws_are_those_probes() -> None:
    of = task(torch.full((3, 16, 16), 0.5), norm="linf", epsilon=0.4, budget=10**6)
    search = NES(pairs=20).search(of)
    query = next(search)
    sigma = query.knobs[0]
    assert [knob.name for knob in query.knobs] == list(NES.knobs)
    drawn = sigma.draw(0.05, 7)
    assert drawn.shape == (7, 3, 16, 16)
    assert float((drawn - 0.5).std()) == pytest.approx(0.05, rel=0.05)
    sigma.value = 0.02
    search.send(constant(query.rows))
    query = search.send(constant(query.rows[:1]))
    assert float((query.rows - 0.5).std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("norm", NORMS)
def test_the_knob_step_keeps_asked_iterates_apart(norm: Norm) -> None:
    model = Slope(SHAPE, 9.0)
    of = task(model.images(1)[0], norm=norm, epsilon=0.1, budget=10**6)
    search = NES().search(of)
    query = next(search)
    knob = query.knobs[1]
    knob.value = 0.05

    def far(rows: Tensor) -> Tensor:
        return rows.abs().flatten(1).mean(1) if norm == "linf" else distance(rows, "l2").float()

    assert torch.allclose(far(knob.draw(0.05, 5) - of.image), torch.tensor(0.05), rtol=1e-3)
    points, silent = [of.image[None]], 0
    for _ in range(30):
        query = search.send(model.answer(query.rows))
        if query.kind == "step":
            points.append(query.rows)
        else:
            silent += 1
    gaps = far(torch.cat(points).diff(dim=0))
    assert len(gaps) >= 1
    assert gaps.min() >= 0.05 * 0.999
    assert silent > 2 * len(gaps)


def test_a_refused_iterate_is_given_up_and_the_next_step_goes_further() -> None:
    model = Slope(SHAPE, 9.0)
    of = task(model.images(1)[0], norm="linf", epsilon=0.4, budget=10**6)
    search, steps, centres = NES(momentum=0.0).search(of), [], []
    query = next(search)
    for k in range(8):
        centres.append(query.rows.mean(0))
        query = search.send(model.answer(query.rows))
        assert query.kind == "step"
        steps.append(query.rows[0])
        answer = model.answer(query.rows)
        if k in (2, 3):
            answer = Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8))
        query = search.send(answer)
    assert torch.allclose(centres[3], steps[1], atol=1e-5)  # back at the last answered one
    assert torch.allclose(centres[4], steps[1], atol=1e-5)
    lengths = [float((step - centre).abs().median()) for step, centre in zip(steps, centres, strict=True)]
    assert lengths[2:6] == pytest.approx([0.08, 0.16, 0.32, 0.08], rel=0.01)


# Partial information and labels only.


def test_with_the_top_class_alone_it_closes_in_from_an_image_of_the_target_class() -> None:
    model = Slope(SHAPE, 0.1)
    images = model.images(2)
    pool = (0.5 + 0.6 * model.normal[None], [1])

    def steep(rows: Tensor) -> Tensor:
        return 20 * model(rows)

    settings: dict[str, Any] = {"norm": "linf", "targets": 1, "budget": 3000, "pool": pool, "knowledge": "top-1"}
    epsilon = 1.5 * model.optimum("linf")
    result = run_attack(steep, images, [0, 0], attack=NES(top=1), epsilon=epsilon, **settings)
    assert result.success.all()
    assert (20 * model(result.adversarials)).argmax(1).tolist() == [1, 1]


def test_candidates_hold_the_target_while_the_ball_shrinks() -> None:
    model = Slope(SHAPE, 0.1)
    of = task(model.images(1)[0], norm="linf", epsilon=0.01, target=1, budget=1500)
    of.pool = (0.5 + 0.6 * model.normal[None], torch.tensor([1]))

    def answers(rows: Tensor) -> Answer:
        scores = (20 * model(rows)).softmax(1)
        best = scores.max(1)
        return Answer.of(
            best.indices, torch.zeros_like(scores).scatter_(1, best.indices[:, None], best.values[:, None])
        )

    _, asked = drive(NES(top=1).search(of), of, answers)
    far = [float(distance(query.rows - of.image, "linf")) for query in asked if query.kind == "step"]
    assert min(far[-20:]) < 0.7 * far[0]
    probes = [query for query in asked if query.kind == "probe"]
    held = [float((model(query.rows).argmax(1) == 1).float().mean()) for query in probes]
    assert min(held) > 0.25


def test_labels_alone_suffice_with_noisy_copies() -> None:
    model = Slope(SHAPE, 0.1)
    pool = (0.5 + 0.6 * model.normal[None], [1])
    attack = NES(copies=20, spread=0.05, sigma=0.02, pairs=5)
    assert attack.knowledge == "label"
    epsilon = 2 * model.optimum("l2")
    labels = {"norm": "l2", "epsilon": epsilon, "targets": 1, "pool": pool, "budget": 6000}
    result = run_attack(lambda rows: model(rows).argmax(1), model.images(2), [0, 0], attack=attack, **labels)  # type: ignore[arg-type]
    assert result.success.all()


def test_a_copy_is_noise_of_the_spread_and_its_probe_counts_the_share_of_labels() -> None:
    of = task(torch.full(SHAPE, 0.5), norm="linf", epsilon=0.4, target=1)
    attack = NES(copies=4, spread=0.1)
    rows = attack._blur(of, torch.full((3, *SHAPE), 0.5))
    assert rows.shape == (12, *SHAPE)
    assert 0.09 < float((rows - 0.5).abs().max()) <= 0.1
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1])
    told = attack._judge(of, Answer(labels, None, (labels < 0).byte()))
    assert told.tolist() == [0.5, 0.0, torch.inf]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"step": -1.0}, "step must be positive, got -1.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and less than 1, got 1.0"),
        ({"plateau": 1}, "plateau must be at least 2, got 1"),
        ({"drop": 0.5}, "drop must be at least 1, got 0.5"),
        ({"top": 1, "copies": 5}, "give one of them"),
        ({"loss": "margn"}, "did you mean margin"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        NES(**options)


def test_poorer_threat_models_need_a_target() -> None:
    model = Slope(SHAPE, 0.1)
    with pytest.raises(InputError, match="give targets and a pool"):
        run_attack(model, model.images(1), [0], attack=NES(top=1), norm="linf", epsilon=0.1)
    assert model.rows == 0


def test_asks_are_queries() -> None:
    """The first query of every threat model, as wrappers see it."""
    of = task(torch.full(SHAPE, 0.5), norm="linf", epsilon=0.1, target=1)
    first: list[Query] = [next(NES(**options).search(of)) for options in ({}, {"top": 1}, {"copies": 2})]
    assert [query.kind for query in first] == ["probe", "init", "init"]
