"""The Boundary Attack: geometry of its proposals, adaptation of its steps, counted rows, distance over the optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.boundary import ORTHOGONAL, SOURCE, Boundary
from robustbox.errors import InputError
from robustbox.protocol import Answer, Query
from tests.attacks.analytic import Flat, check_box, drive, refusing, task, unit

SHAPE = (3, 8, 8)


def first_step(flat: Flat, attack: Boundary) -> tuple[Query, Tensor, Tensor]:
    """The first proposal of a walk, the source and the point where the walk stands."""
    of = task(flat.images(1)[0], budget=10_000)
    search = attack.search(of)
    query, point = next(search), of.image[None]
    while query.kind != "probe":
        labels = flat(query.rows)
        if query.kind == "line" and labels.all():
            point = query.rows
        query = search.send(Answer.of(labels))
    query = search.send(Answer.of(torch.zeros(attack.batch).long()))
    assert query.kind == "step"
    return query, of.image, point


@pytest.mark.parametrize("batch", [1, 3])
def test_proposals_are_the_papers(batch: int) -> None:
    """Distance (1 - epsilon) R; delta R away from where the walk stands, orthogonally, before the sphere shrinks it."""
    flat = Flat(SHAPE, 0.2)
    query, image, point = first_step(flat, Boundary(batch=batch))
    orthogonal, source = query.knobs
    radius = torch.dist(point, image[None])
    ray = (point - image).flatten() / radius
    for delta, epsilon in ((0.3, 0.02), (0.1, 0.1)):
        orthogonal.value, source.value = delta, epsilon
        assert query.redraw is not None
        for proposed in (query.redraw(list(range(batch))), source.draw(epsilon, 50)):
            lengths = (proposed - image).flatten(1).norm(dim=1) / radius
            assert torch.allclose(lengths, torch.tensor(1 - epsilon), atol=1e-4)
            cosines = (proposed - image).flatten(1) @ ray / (radius * lengths)
            assert torch.allclose(cosines, torch.tensor(1 / math.sqrt(1 + delta**2)), atol=1e-4)
        bare = orthogonal.draw(delta, 50)
        assert torch.allclose((bare - image).flatten(1).norm(dim=1) / radius, torch.tensor(1.0), atol=1e-4)
    # Their directions are spread evenly: no two alike, none preferred.
    across = torch.nn.functional.normalize((bare - image).flatten(1) / radius - ray * cosines[0], dim=1)
    products = across @ across.T - torch.eye(50)
    assert products.abs().max() < 0.4
    assert abs(products.sum() / (50 * 49)) < 0.02


def test_where_it_goes_is_what_was_redrawn() -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], budget=10_000)
    search = Boundary(period=1000).search(of)
    query = next(search)
    while query.kind != "step":
        query = search.send(Answer.of(flat(query.rows)))
    assert query.redraw is not None
    sent = query.rows.clone()
    fresh = query.redraw([0])
    assert torch.equal(query.rows, sent)
    query = search.send(Answer.of(torch.ones(1).long()))
    query.knobs[0].value = 1e-4
    cosine = torch.nn.functional.cosine_similarity(
        (query.redraw([0]) - of.image).flatten(), (fresh - of.image).flatten(), dim=0
    )
    assert cosine > 1 - 1e-6


def test_the_steps_settle_at_their_success_ratios() -> None:
    """On a half-space, far enough from its optimum: the ratios of the module, give or take."""
    flat = Flat((3, 16, 16), 0.2)
    of = task(flat.images(1)[0], budget=3000)
    _, queries = drive(Boundary(period=2).search(of), of, flat)
    for kind, ratio in (("probe", ORTHOGONAL), ("step", SOURCE)):
        late = torch.cat([query.rows for query in queries if query.kind == kind])[-600:]
        assert flat(late).float().mean() == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize(("batch", "figures"), [(1, (1.30, 1.01)), (4, (1.40, 1.02))])
def test_distance_over_the_optimum_of_a_half_space(batch: int, figures: tuple[float, float]) -> None:
    flat = Flat(SHAPE, 0.2)
    images = flat.images(4)
    result = run_attack(flat, images, [0] * 4, attack=Boundary(batch=batch), budget=5000)
    ratios = [float(np.median(result.distance_at(q))) / 0.2 for q in (1000, 5000)]
    assert ratios[0] <= 1.08 * figures[0]
    assert ratios[1] <= 1.01 * figures[1]
    assert (result.distance >= 0.2 - 1e-6).all()
    assert flat.rows == sum(result.ledger.values())
    assert flat(result.adversarials).all()


def test_a_target_is_reached_from_the_pool() -> None:
    flat = Flat(SHAPE, 0.2)

    def three(rows: Tensor) -> Tensor:
        """Class 1 lies one way, class 2 the other, nearer."""
        along = ((rows - 0.5).flatten(1) @ flat.normal.flatten()).double()
        return (along > 0.2).long() + 2 * (along < -0.05).long()

    pool = ((0.5 + 0.5 * flat.normal + 0.4 * unit(SHAPE, 77)).clamp(0, 1)[None], [1])
    result = run_attack(three, flat.images(3), [0] * 3, attack=Boundary(), targets=1, pool=pool, budget=1500)
    assert (three(result.adversarials) == 1).all()
    assert np.median(result.distance) < 1.4 * 0.2


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_counted_as_the_docstring_says(batch: int) -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], budget=300)
    _, queries = drive(Boundary(period=4, batch=batch).search(of), of, flat)
    first = next(k for k, query in enumerate(queries) if query.kind == "probe")
    walk = queries[first:]
    assert [query.kind for query in walk] == (["probe", "step", "step", "step", "step"] * len(walk))[: len(walk)]
    assert all(len(query.rows) == batch for query in walk)


# Hard cases


@pytest.mark.parametrize("number", [0, 3, 9, 57])
def test_one_refused_row_does_not_end_it(number: int) -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], budget=1500)
    _, queries = drive(Boundary().search(of), of, refusing(flat, lambda k: k == number))
    found = torch.cat([query.rows for query in queries])
    assert (found[flat(found) == 1] - of.image).flatten(1).norm(dim=1).min() < 1.35 * 0.2


def test_refused_rows_carry_no_information_but_lengthen_the_steps() -> None:
    flat = Flat(SHAPE, 0.2)
    transcripts = []
    for garbage in (-1, 0, 1):
        of = task(flat.images(1)[0], budget=400)
        _, queries = drive(Boundary().search(of), of, refusing(flat, lambda k: k % 5 == 4, garbage))
        transcripts.append(torch.cat([query.rows for query in queries]))
    assert torch.equal(transcripts[0], transcripts[1])
    assert torch.equal(transcripts[0], transcripts[2])
    of = task(flat.images(1)[0], budget=200)
    _, queries = drive(Boundary().search(of), of, refusing(flat, lambda k: k >= 60))
    # Both grow up to their limits, 1 and 1/2, without a move.
    found = torch.cat([query.rows for query in queries[:60]])
    radius = (found[flat(found) == 1] - of.image).flatten(1).norm(dim=1).min()
    last = [query for query in queries if query.kind == "step"][-1]
    assert float(torch.dist(last.rows[0], of.image)) == pytest.approx(float(radius) / 2, rel=0.01)


@pytest.mark.parametrize("budget", [1, 7, 29, 100])
def test_budgets_are_spent_to_the_row(budget: int) -> None:
    flat = Flat(SHAPE, 0.05)
    result = run_attack(flat, flat.images(2), [0] * 2, attack=Boundary(batch=2), budget=budget)
    assert result.errors == [None] * 2
    assert (result.queries == budget).all()
    assert flat.rows == sum(result.ledger.values())


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("label", [0, 1])
def test_flat_images_and_constant_models(value: float, label: int) -> None:
    """A model that never changes ends it; one that always says yes leads it to the image; neither fails."""
    of = task(torch.full((1, 5, 8), value), budget=400)
    _, queries = drive(Boundary().search(of), of, lambda rows: torch.full((len(rows),), label))
    nearest = min((query.rows - of.image).flatten(1).norm(dim=1).min() for query in queries)
    assert (nearest < 1e-3) if label else (of.remaining > 0)


def test_an_image_of_one_value_has_no_way_across() -> None:
    of = task(torch.zeros(1, 1, 1), budget=100)
    _, queries = drive(Boundary().search(of), of, lambda rows: (rows.flatten() > 0.3).long())
    assert min(float(query.rows.max()) for query in queries if query.rows.max() > 0.3) < 0.32


def test_random_answers_neither_fail_nor_hang() -> None:
    coin = torch.Generator().manual_seed(0)
    of = task(torch.rand(3, 6, 6, generator=coin), budget=800, stochastic=True)
    _, queries = drive(Boundary().search(of), of, lambda rows: torch.randint(2, (len(rows),), generator=coin))
    assert sum(len(query.rows) for query in queries) > 100


def test_on_a_stochastic_box_it_asks_again_where_it_stands() -> None:
    flat = Flat(SHAPE, 0.2)
    of = task(flat.images(1)[0], budget=200, stochastic=True)
    _, queries = drive(Boundary(period=5).search(of), of, flat)
    first = next(k for k, query in enumerate(queries) if query.kind == "probe")
    walk = [query.kind for query in queries[first - 1 :]]
    assert walk == (["line", "probe", *["step"] * 5] * len(walk))[: len(walk)]


def test_rows_of_a_black_image_stay_in_the_box() -> None:
    weights = unit((1, 9, 14), 4).abs()
    threshold = 0.25 * float(weights.sum())

    def model(rows: Tensor) -> Tensor:
        check_box(rows)
        return (torch.einsum("nchw,chw->n", rows, weights) > threshold).long()

    result = run_attack(model, torch.zeros(1, 1, 9, 14), [0], attack=Boundary(), budget=1500)
    assert threshold <= result.distance[0] < 1.3 * threshold


@pytest.mark.parametrize(
    ("option", "value"),
    [("orthogonal", 0.0), ("orthogonal", 2.0), ("source", 1.0), ("rate", 0.0), ("period", 0), ("batch", 0)],
)
def test_bad_options_are_refused_in_one_line(option: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{option} must be .*, got {value}$"):
        Boundary(**{option: value})  # type: ignore[arg-type]
