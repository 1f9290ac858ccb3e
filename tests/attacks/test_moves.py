"""The moves that attacks share, on models known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustbox.attacks import moves
from robustbox.attacks.moves import bisect_arc, bisect_line, estimate_normal, find_start
from robustbox.attacks.subspaces import sampler
from robustbox.protocol import REJECTED, Answer
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
        monkeypatch.setattr(moves, "HELD_BYTES", limit)
        of = task(image)
        sample = sampler("dct", (3, 8, 8), 2, of.generator)
        (total, _), (query,) = drive(estimate_normal(of, point, 0.001, 40, sample), of, flat)
        held.append((total, query.rows, torch.randn(3, generator=of.generator)))
    assert all(map(torch.equal, *held))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_start_search_is_bounded_when_nothing_is_adversarial(shape: tuple[int, int, int], value: float) -> None:
    for target in (None, 1):
        pool = (torch.rand(30, *shape, generator=torch.Generator().manual_seed(1)), torch.ones(30).long())
        of = task(torch.full(shape, value), target=target, pool=pool)
        start, asked = drive(find_start(of), of, lambda rows: torch.zeros(len(rows)).long())
        assert start is None
        assert sum(len(query.rows) for query in asked) <= 3 * 6 + 10 + 19
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
