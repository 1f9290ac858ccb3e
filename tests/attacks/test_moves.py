"""The moves that attacks share, on models known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustbox.attacks import moves
from robustbox.attacks.moves import bisect_arc, bisect_line, estimate_normal, hold, radius_knob, shrinking
from robustbox.attacks.starts import WAVES, find_start
from robustbox.attacks.subspaces import sampler
from robustbox.protocol import REJECTED, Answer, Query
from tests.attacks.analytic import Flat, drive, task

SHAPES = [(3, 8, 8), (1, 28, 28), (1, 6, 14), (3, 1, 1)]


def refuse(labels: Tensor, refused: Tensor) -> Answer:
    return Answer(torch.where(refused, -1, labels), None, refused.to(torch.uint8) * REJECTED)


def test_bisect_line_ends_within_tolerance_on_the_adversarial_side() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0])
    end = (of.image + flat.normal)[None].clamp(0, 1)
    point, asked = drive(bisect_line(of, end, 0.003), of, flat)
    assert flat(point) == 1
    # Along the normal the crossing lies at 0.2 exactly.
    assert 0.2 < torch.dist(point, of.image) <= 0.2031
    assert len(asked) == math.ceil(math.log2(torch.dist(end, of.image) / 0.003))
    assert any(torch.equal(point, query.rows) for query in asked)


def test_bisect_line_without_room_asks_nothing() -> None:
    of = task(torch.full((1, 4, 4), 0.5))
    end = of.image[None] + 1e-4
    assert drive(bisect_line(of, end, 0.01), of, lambda rows: torch.ones(len(rows)).long()) == (end, [])


def test_bisect_arc_finds_a_planted_parameter() -> None:
    of = task(torch.zeros(1, 1, 1))
    found, asked = drive(
        bisect_arc(of, lambda t: torch.full((1, 1, 1, 1), t), 0.0, 1.0, 1e-3),
        of,
        lambda rows: (rows[:, 0, 0, 0] <= 0.3141).long(),
    )
    assert 0.3131 < found <= 0.3141
    assert len(asked) == 10


def test_bisect_arc_stops_at_its_best_point_when_refused() -> None:
    of = task(torch.zeros(1, 1, 1))
    seen: list[float] = []

    def answers(rows: Tensor) -> Answer:
        seen.append(rows.item())
        return refuse((rows[:, 0, 0, 0] <= 0.9).long(), torch.tensor([len(seen) == 3]))

    found, _ = drive(bisect_arc(of, lambda t: torch.full((1, 1, 1, 1), t), 0.0, 1.0, 1e-3), of, answers)
    assert seen == [0.5, 0.75, 0.875]
    assert found == 0.75


def test_bisection_is_bounded_whatever_the_tolerance() -> None:
    of = task(torch.zeros(1, 1, 1))
    _, asked = drive(
        bisect_arc(of, lambda t: torch.full((1, 1, 1, 1), t), 0.0, 1.0, 0.0), of, lambda rows: torch.zeros(1).long()
    )
    assert len(asked) == moves.MAX_HALVINGS


@pytest.mark.parametrize("count", [100, 1000])
def test_estimated_normal_has_the_cosine_of_theory(count: int) -> None:
    flat = Flat((3, 8, 8), 0.2)
    image = flat.images(1)[0]
    point = (image + 0.2001 * flat.normal)[None]
    cosines = []
    for seed in range(20):
        of = task(image, seed=seed, budget=count)
        sample = sampler("full", (3, 8, 8), 1, of.generator)
        (total, share), _ = drive(estimate_normal(of, point, 0.01, count, sample), of, flat)
        cosines.append(float((total[0] * flat.normal).sum() / total.norm()))
        assert 0.3 < share < 0.7
    expected = math.sqrt(2 / math.pi) / math.sqrt(2 / math.pi + 191 / count)
    assert sum(cosines) / 20 == pytest.approx(expected, abs=0.04)


def test_estimate_is_the_signed_sum_of_the_noise_that_was_sent() -> None:
    flat = Flat((3, 8, 8), 0.2)
    image = flat.images(1)[0]
    point = (image + 0.2 * flat.normal)[None]
    of = task(image)
    sample = sampler("full", (3, 8, 8), 1, of.generator)
    (total, share), (query,) = drive(estimate_normal(of, point, 0.001, 50, sample), of, flat)
    signs = 2.0 * flat(query.rows) - 1
    expected = torch.einsum("n,nchw->chw", signs, (query.rows - point) / 0.001)
    assert torch.allclose(total[0], expected, atol=0.02)
    assert share == pytest.approx(float((signs > 0).float().mean()))


def test_refused_rows_carry_no_information() -> None:
    flat = Flat((3, 8, 8), 0.2)
    image = flat.images(1)[0]
    point = (image + 0.2 * flat.normal)[None]
    refused = torch.arange(60) % 3 == 0
    totals = []
    for garbage in (0, 1):
        of = task(image)
        sample = sampler("full", (3, 8, 8), 1, of.generator)

        def answers(rows: Tensor, garbage: int = garbage) -> Answer:
            return Answer(torch.where(refused, garbage, flat(rows)), None, refused.to(torch.uint8) * REJECTED)

        (total, share), (query,) = drive(estimate_normal(of, point, 0.001, 60, sample), of, answers)
        totals.append(total)
        assert share == pytest.approx(float(flat(query.rows[~refused]).float().mean()))
    assert torch.equal(*totals)
    signs = (2.0 * flat(query.rows) - 1) * ~refused
    assert torch.allclose(totals[0][0], torch.einsum("n,nchw->chw", signs, (query.rows - point) / 0.001), atol=0.02)


def test_nothing_answered_gives_no_direction() -> None:
    of = task(torch.full((1, 4, 4), 0.5))
    sample = sampler("full", (1, 4, 4), 1, of.generator)
    answers = lambda rows: refuse(torch.zeros(len(rows)).long(), torch.ones(len(rows)).bool())  # noqa: E731
    (total, share), _ = drive(estimate_normal(of, of.image[None], 0.01, 5, sample), of, answers)
    assert not total.any()
    assert math.isnan(share)


def test_no_query_holds_more_rows_than_the_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Flat((3, 8, 8), 0.2)
    image = flat.images(1)[0]
    point = (image + 0.2 * flat.normal)[None]
    results = []
    for rows in (7, 1000):
        monkeypatch.setattr(moves, "ROW_BYTES", rows * 4 * 192)
        of = task(image)
        sample = sampler("full", (3, 8, 8), 1, of.generator)
        result, asked = drive(estimate_normal(of, point, 0.001, 7 * 16, sample), of, flat)
        assert sum(len(query.rows) for query in asked) == 7 * 16
        assert max(len(query.rows) for query in asked) <= rows
        results.append(result)
        left = torch.randn(3, generator=of.generator)
    assert len(asked) == 1
    # The stream goes on where it would be had each row been drawn once.
    again = torch.Generator().manual_seed(0)
    torch.randn(7 * 16, 3, 8, 8, generator=again)
    assert torch.equal(left, torch.randn(3, generator=again))


def test_noise_that_is_drawn_again_is_the_noise_that_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Flat((3, 8, 8), 0.2)
    image = flat.images(1)[0]
    point = (image + 0.2 * flat.normal)[None]
    held = []
    for limit in (0, 2**20):
        monkeypatch.setattr("robustbox.attacks.noise.HELD_BYTES", limit)
        of = task(image)
        sample = sampler("dct", (3, 8, 8), 2, of.generator)
        (total, _), (query,) = drive(estimate_normal(of, point, 0.001, 40, sample), of, flat)
        held.append((total, query.rows, torch.randn(3, generator=of.generator)))
    assert all(map(torch.equal, *held))


@pytest.mark.parametrize("limit", [0, 2**20])
def test_what_was_redrawn_is_what_the_estimate_sums(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Also where the noise was not held, and the stream was used between the query and its answer."""
    monkeypatch.setattr("robustbox.attacks.noise.HELD_BYTES", limit)
    flat = Flat((3, 8, 8), 0.2)
    image = flat.images(1)[0]
    point = (image + 0.2 * flat.normal)[None]
    of = task(image)
    knob = radius_knob(image)
    search = estimate_normal(of, point, 0.001, 40, sampler("full", (3, 8, 8), 1, of.generator), knob)
    query = next(search)
    rows = query.rows.clone()
    knob.draw(0.1, 5)
    assert query.redraw is not None
    for positions in ([3, 30], [30, 7]):
        rows[positions] = query.redraw(positions)
    assert (rows != query.rows).flatten(1).any(dim=1).nonzero().flatten().tolist() == [3, 7, 30]
    with pytest.raises(StopIteration) as done:
        search.send(Answer.of(flat(rows)))
    total, share = done.value.value
    signs = 2.0 * flat(rows) - 1
    assert torch.allclose(total[0], torch.einsum("n,nchw->chw", signs, (rows - point) / 0.001), atol=0.02)
    assert share == pytest.approx(float(flat(rows).float().mean()))


def test_the_radius_knob_is_the_length_of_the_noise() -> None:
    flat = Flat((3, 8, 8), 0.2)
    of = task(flat.images(1)[0])
    knob = radius_knob(of.image)
    assert (knob.low, knob.high) == pytest.approx((1e-3 * math.sqrt(192), math.sqrt(192) / 8))
    assert knob.draw(1.0, 3).shape == (3, 3, 8, 8)
    point = (of.image + 0.2 * flat.normal)[None]
    for factor, dims in ((1, 192), (4, 12)):
        sample = sampler("dct", (3, 8, 8), factor, of.generator)
        knob.value = 0.4
        query = next(estimate_normal(of, point, 0.001, 300, sample, knob))
        assert query.knobs == (knob,)
        assert query.redraw is not None
        for rows, length in ((query.rows, 0.4), (query.redraw([*range(300)]), 0.4), (knob.draw(0.1, 300), 0.1)):
            noise = (rows - point).flatten(1)
            assert noise.norm(dim=1).square().mean().sqrt() == pytest.approx(length, rel=0.08)
            assert torch.linalg.matrix_rank(noise.double(), rtol=1e-3) == dims
        knob.value = None
        assert (query.redraw([0]) - point).norm() == pytest.approx(0.001 * math.sqrt(192), rel=0.4)


def test_the_mean_of_the_answers_is_taken_off() -> None:
    """A point off the boundary, most of whose noise succeeds: sum_j (s_j - mean) u_j, more nearly the normal."""
    flat = Flat((3, 8, 8), 0.2)
    point = (flat.images(1)[0] + 0.215 * flat.normal)[None]
    cosines = []
    for centred in (False, True):
        of = task(flat.images(1)[0], seed=3)
        sample = sampler("full", (3, 8, 8), 1, of.generator)
        (total, share), (query,) = drive(estimate_normal(of, point, 0.01, 600, sample, centred=centred), of, flat)
        signs = 2.0 * flat(query.rows) - 1 - (2 * share - 1 if centred else 0)
        assert torch.allclose(total[0], torch.einsum("n,nchw->chw", signs, (query.rows - point) / 0.01), atol=0.02)
        cosines.append(float((total[0] * flat.normal).sum() / total.norm()))
    assert share > 0.9
    assert cosines[1] > cosines[0] + 0.1


def test_a_one_sided_estimate_is_left_as_it_is() -> None:
    of = task(torch.full((1, 4, 4), 0.5))
    sample = sampler("full", (1, 4, 4), 1, of.generator)
    search = estimate_normal(of, of.image[None], 0.01, 9, sample, centred=True)
    (total, share), (query,) = drive(search, of, lambda rows: torch.ones(len(rows)).long())
    assert share == 1
    assert torch.allclose(total, ((query.rows - of.image) / 0.01).sum(dim=0, keepdim=True), atol=1e-3)


def held(answers: list[int | None], end: Tensor | None = None, stochastic: bool = True) -> tuple[Tensor, list[Query]]:
    """`hold` at 0.1 from the image on one axis, told these answers: 1 reached, 0 not, None refused."""
    of = task(torch.full((1, 2, 2), 0.5), stochastic=stochastic)
    point = of.image[None].clone()
    point[0, 0, 0, 0] += 0.1
    given = iter(answers)

    def answer(_: Tensor) -> Answer:
        label = next(given)
        return refuse(torch.tensor([label or 0]), torch.tensor([label is None]))

    found, asked = drive(hold(of, point, end), of, answer)
    assert found is not None
    return found, asked


def test_hold_asks_nothing_of_a_deterministic_box() -> None:
    found, asked = held([], stochastic=False)
    assert found[0, 0, 0, 0] == pytest.approx(0.6)
    assert not asked


@pytest.mark.parametrize(
    ("answers", "where"),
    [([1], 0.6), ([None], 0.6), ([0, 1], 0.603125), ([0, 0, 0, 1], 0.6125), ([0, None], 0.603125), ([0] * 7, 0.7)],
)
def test_hold_steps_outward_until_it_stands(answers: list[int | None], where: float) -> None:
    found, asked = held(answers)
    assert len(asked) == len(answers)
    assert found.flatten().tolist() == pytest.approx([where, 0.5, 0.5, 0.5])
    assert torch.equal(found, asked[-1].rows)


def test_hold_goes_to_the_end_that_it_is_given() -> None:
    end = torch.tensor([[[[0.6, 0.9], [0.5, 0.5]]]])
    found, _ = held([0, 0, 1], end)
    assert found.flatten().tolist() == pytest.approx([0.6, 0.525, 0.5, 0.5])
    assert torch.equal(held([0] * 7, end)[0], end)


def test_starts_can_be_drawn_again() -> None:
    """Random ones only, each in its kind; and the search takes what was drawn last."""
    of = task(torch.full((1, 16, 16), 0.5))
    search = find_start(of)
    query, randoms = next(search), []
    while True:
        randoms.append(query.redraw is not None)
        if query.redraw is not None:
            again = query.redraw([len(query.rows) - 1, 0])
            assert again.shape == (2, 1, 16, 16)
            for old, new in zip(query.rows[[-1, 0]], again, strict=True):
                assert not torch.equal(old, new)
                assert 0.3 < (new - 0.5).norm() / (old - 0.5).norm() < 3  # amplitudes differ by 4 or more
            if sum(randoms) <= 3:
                assert len(again[1].unique()) <= 4  # one 2 x 2 pattern
        if len(randoms) == 8:
            break
        query = search.send(Answer.of(torch.zeros(len(query.rows)).long()))
    assert randoms == [True] * 3 + [False] + [True] * 4
    labels = torch.zeros(4).long()
    labels[0] = 1
    line = search.send(Answer.of(labels))
    assert torch.nn.functional.cosine_similarity(line.rows.flatten() - 0.5, again[1].flatten() - 0.5, dim=0) > 0.999


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_start_search_is_bounded_when_nothing_is_adversarial(shape: tuple[int, int, int], value: float) -> None:
    for target in (None, 1):
        pool = (torch.rand(30, *shape, generator=torch.Generator().manual_seed(1)), torch.ones(30).long())
        of = task(torch.full(shape, value), target=target, pool=pool)
        start, asked = drive(find_start(of), of, lambda rows: torch.zeros(len(rows)).long())
        assert start is None
        assert sum(len(query.rows) for query in asked) <= 3 * 6 + 10 + 55
        assert asked[-1].rows.std() > 0.3  # the last resort is saturated noise


@pytest.mark.parametrize("kind", ["black", "white", "grey"])
def test_start_is_found_where_only_a_flat_image_is_adversarial(kind: str) -> None:
    value = {"black": 0.0, "white": 1.0, "grey": 0.5}[kind]
    of = task(torch.full((1, 6, 6), 0.3))
    start, _ = drive(find_start(of), of, lambda rows: (rows.flatten(1) - value).abs().amax(1).lt(0.01).long())
    assert torch.equal(start, torch.full((1, 1, 6, 6), value))


def test_start_is_found_where_only_heavy_noise_is_adversarial() -> None:
    of = task(torch.full((1, 12, 12), 0.5))
    start, _ = drive(find_start(of), of, lambda rows: (rows.flatten(1).std(1) > 0.47).long())
    assert start.std() > 0.47


@pytest.mark.parametrize("others", [False, True])
def test_the_image_itself_is_no_start(others: bool) -> None:
    """A stochastic box that says yes to black once: alone, or with white and grey."""
    of, queries = task(torch.zeros(1, 6, 6), stochastic=True), 0

    def answers(rows: Tensor) -> Tensor:
        nonlocal queries
        queries += 1
        flat = rows.flatten(1).amax(1) == rows.flatten(1).amin(1)
        black = rows.flatten(1).amax(1) == 0
        return ((flat if others else black) & (queries == 4) | (queries > 4)).long()

    start, asked = drive(find_start(of), of, answers)
    assert start is not None
    assert torch.dist(start[0], of.image) > 0
    assert [query.kind for query in asked[:6]] == ["init"] * 4 + (["line"] * 2 if others else ["init", "line"])


def test_targeted_start_is_the_pool_image_with_the_shortest_line() -> None:
    """Ten images of the target class on their own rays; class 1 begins at a length of its own on each."""
    shape = (1, 8, 8)
    image = torch.full(shape, 0.5)
    rays = torch.zeros(10, *shape)
    for i in range(10):
        rays[i, 0, i % 8, i // 8] = 0.45
    begins = torch.tensor([0.40, 0.42, 0.30, 0.41, 0.10, 0.38, 0.35, 0.43, 0.33, 0.39])

    def labels(rows: Tensor) -> Tensor:
        along = torch.einsum("nchw,kchw->nk", rows - image, rays / 0.45)
        return (along > begins).any(dim=1).long()

    others = torch.rand(20, *shape, generator=torch.Generator().manual_seed(0))
    pool = (torch.cat([others, image + rays]), torch.cat([torch.full((20,), 2), torch.ones(10).long()]))
    of = task(image, target=1, pool=pool)
    start, asked = drive(find_start(of), of, labels)
    assert torch.equal(asked[0].rows.flatten(1).sum(1).sort().values, (image + rays).flatten(1).sum(1).sort().values)
    assert (start - image).flatten().argmax() == 4 * 8
    assert 0.1 < torch.dist(start, image) < 0.14


def test_targeted_start_takes_the_nearest_images_of_the_class_only() -> None:
    image = torch.full((1, 4, 4), 0.5)
    pool = (torch.stack([image + 0.02 * k for k in range(25)]), torch.arange(25) % 2)
    of = task(image, target=1, pool=pool)
    _, asked = drive(find_start(of), of, lambda rows: torch.zeros(len(rows)).long())
    expected = torch.stack([image + 0.02 * k for k in range(1, 20, 2)])
    assert torch.allclose(asked[0].rows, expected)


def test_a_change_is_cut_off_at_ever_smaller_balls_and_kept_where_it_is_small() -> None:
    image, delta = torch.full((1, 2, 2), 0.5), torch.tensor([[[[0.7, -0.3], [0.05, 0.0]]]])
    path = shrinking(task(image), delta, 0.2)
    for share in (0.0, 0.25, 0.9, 1.0):
        far = 0.2 * (1 - share)
        expected = torch.tensor([[[[far, -far], [min(0.05, far), 0.0]]]])
        assert torch.allclose(path(share) - image, expected, atol=1e-7)
    dark = shrinking(task(torch.zeros(1, 2, 2)), delta, 0.2)(0.5)
    assert dark.flatten().tolist() == pytest.approx([0.1, 0.0, 0.05, 0.0])  # the box takes the rest


def test_a_target_without_images_is_looked_for_with_waves_of_every_length() -> None:
    """Where only long waves reach the goal, or only short ones; and no more rows than said."""
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3)) * 0.2

    def crosses(rows: Tensor) -> Tensor:
        """How often a row's grey crosses its mean, from top to bottom and from left to right."""
        grey = rows.mean(1)
        above = (grey > grey.mean((1, 2), keepdim=True)).float()
        return torch.maximum(above.diff(dim=1).abs().mean((1, 2)), above.diff(dim=2).abs().mean((1, 2)))

    for rule in (lambda rows: crosses(rows) < 0.15, lambda rows: crosses(rows) > 0.65):
        for seed in range(3):
            of = task(image, target=1, seed=seed)

            def label(rows: Tensor, rule: Callable[[Tensor], Tensor] = rule) -> Tensor:
                return (rule(rows) & (rows.flatten(1).std(1) > 0.1)).long()

            start, asked = drive(find_start(of), of, label)
            assert start is not None
            assert label(start).item() == 1
            assert sum(len(query.rows) for query in asked) <= 19 + WAVES + 40


def test_a_targeted_start_search_asks_as_many_rows_as_it_says() -> None:
    of = task(torch.full((3, 8, 8), 0.5), target=1)
    start, asked = drive(find_start(of), of, lambda rows: torch.zeros(len(rows)).long())
    assert start is None
    assert sum(len(query.rows) for query in asked) == 19 + WAVES
    for query in asked[1:]:
        assert query.redraw is not None
        again = query.redraw([len(query.rows) - 1])
        assert again.shape == (1, 3, 8, 8)
        assert not torch.equal(again[0], query.rows[-1])
        assert again.min() >= 0
        assert again.max() <= 1


@pytest.mark.parametrize("target", [None, 1])
def test_a_start_search_made_again_asks_nothing_that_was_asked(target: int | None) -> None:
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    of = task(torch.full((3, 8, 8), 0.5), target=target, pool=(images, torch.ones(20).long()))

    def nothing(rows: Tensor) -> Tensor:
        return torch.zeros(len(rows)).long()

    _, first = drive(find_start(of), of, nothing)
    start, second = drive(find_start(of, again=True), of, nothing)
    assert start is None
    rows = torch.cat([query.rows for query in [*first, *second]])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert len(torch.cat([query.rows for query in first])) - 13 == len(torch.cat([query.rows for query in second]))
