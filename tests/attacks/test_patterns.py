"""Patterns: rows stand where they are told to, planted waves and edges are found, and a climb ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.attacks import patterns
from robustbox.attacks.approach import approach
from robustbox.attacks.flips import FLIPS, START
from robustbox.attacks.nearer import NARROWER, WIDER
from robustbox.attacks.patterns import LEAST, RIVALS, STEP, WAVES, Patterns, Pieces, Wavelets, climb
from robustbox.attacks.starts import find_start
from robustbox.attacks.waterfill import Waterfill
from robustbox.distances import distance
from robustbox.protocol import REJECTED, Answer, Norm, Query, Task
from tests.attacks.analytic import drive, task

GREY = torch.full((3, 16, 16), 0.5)
NOISE = torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(2))


def aim(pool: tuple[Tensor, Tensor] | None = None, image: Tensor = GREY, norm: Norm = "l2", **fields: Any) -> Task:
    """Away from class 0, or with a pool towards class 1."""
    return task(image, norm, budget=2000, target=None if pool is None else 1, pool=pool, **fields)


def pictures(n: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images of class 1 that differ in contrast."""
    generator = torch.Generator().manual_seed(1)
    images = 0.5 + torch.rand(n, 3, size, size, generator=generator).sub(0.5) * torch.linspace(0.2, 1, n).view(
        -1, 1, 1, 1
    )
    return images, torch.ones(n, dtype=torch.long)


def climbed(of: Task, label: Callable[[Tensor], int], least: float | None = None) -> tuple[Tensor | None, list[Query]]:
    """A climb against a rule for labels: its end, and what it asked."""
    end, asked = drive(climb(of, least=least), of, lambda rows: torch.tensor([label(row) for row in rows]))
    assert of.remaining > 0
    return end, asked


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("image", [GREY, torch.zeros(1, 9, 7), NOISE], ids=["grey", "black", "random"])
@pytest.mark.parametrize("kind", ["wavelets", "pieces"])
def test_a_row_stands_at_the_distance_that_is_asked(norm: Norm, image: Tensor, kind: str) -> None:
    pool = torch.rand(4, *image.shape, generator=torch.Generator().manual_seed(1)), torch.ones(4, dtype=torch.long)
    of = aim(pool if kind == "pieces" else None, image, norm)
    family: Patterns = Wavelets(of) if kind == "wavelets" else Pieces(of)
    far = 0.05 * (math.sqrt(image.numel()) if norm == "l2" else 1)
    pattern = family.new()
    for _ in range(20):
        row = family.row(pattern, torch.tensor([far]))
        assert torch.isfinite(row).all()
        assert row.min() >= 0
        assert row.max() <= 1
        assert float(distance(row - image, norm)) == pytest.approx(far, rel=0.02)
        pattern = family.near(pattern)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (2, 2, 2)])
def test_the_smallest_images_make_no_trouble(shape: tuple[int, int, int]) -> None:
    end, _ = climbed(aim(image=torch.full(shape, 0.5)), lambda row: int((row - 0.5).abs().max() > 0.01))
    assert end is not None
    end, _ = climbed(
        aim((torch.ones(2, *shape), torch.ones(2, dtype=torch.long)), torch.full(shape, 0.5)),
        lambda row: int(row.mean() > 0.6),
    )
    assert end is not None


def test_a_planted_wave_is_found_nearer_than_by_a_start() -> None:
    y, x = torch.arange(16.0)[:, None], torch.arange(16.0)
    wave = torch.sin(2 * math.pi * (0.11 * y + 0.17 * x) + 1).expand(3, 16, 16)
    wave = wave / wave.norm()

    def label(row: Tensor) -> int:
        return int(float(((row - GREY) * wave).sum()) > 0.1)  # at best 0.1 from the image

    lengths, starts = [], []
    for seed in range(9):
        end, asked = climbed(aim(seed=seed), label)
        assert all(len(query.rows) == 1 for query in asked)
        assert end is None or label(end[0]) == 1
        lengths.append(math.inf if end is None else float(torch.dist(end[0], GREY)))
        of = aim(seed=seed)
        start, _ = drive(find_start(of), of, lambda rows: torch.tensor([label(row) for row in rows]))
        assert start is not None
        starts.append(float(torch.dist(start[0], GREY)))
    assert sorted(lengths)[2] < 0.14  # the others stand on a wave beside it
    assert sorted(lengths)[4] < 0.5 * sorted(starts)[4]


def test_strokes_are_found_nearer_than_waves_that_are_as_wide_as_the_image() -> None:
    """Class 1 is a short wave of five pixels anywhere, or much of any wave all over the image: the start."""
    image = torch.full((1, 28, 28), 0.5)
    bell = torch.hann_window(7)[1:-1]
    stroke = bell[:, None] * bell * torch.sin(2 * math.pi / 5 * torch.arange(5))
    stroke = stroke / stroke.norm()

    def label(row: Tensor) -> int:
        anywhere = F.conv2d((row - image)[None], stroke[None, None]).abs().max()
        return int(anywhere > 0.5 or torch.fft.rfft2(row[0])[2:27, 2:].abs().max() > 80)

    def usual() -> float:
        ends = [climbed(aim(image=image, seed=seed), label)[0] for seed in range(15)]
        return sorted(math.inf if end is None else float(torch.dist(end[0], image)) for end in ends)[7]

    windowed = usual()
    assert windowed < 0.75  # at best 0.5
    with patch.object(patterns, "WINDOWS", (1e3, 1e3)):
        assert usual() > 1.3 * windowed


@pytest.mark.parametrize(("norm", "pool"), [("l2", True), ("linf", False), ("linf", True)])
def test_new_wavelets_stand_in_windows_in_l2_untargeted_alone(norm: Norm, pool: bool) -> None:
    windows = torch.stack([Wavelets(aim()).new()[3:6] for _ in range(2)])
    assert (windows[:, 0] > 0).all()
    assert windows[:, 1:].abs().max() <= 0.7
    of = aim(pictures(2) if pool else None, norm=norm)
    assert not Wavelets(of).new()[3:6].any()


def test_of_a_target_the_edges_in_the_middle_are_kept() -> None:
    images, labels = pictures(5)
    images = (images + 0.2).clamp(0, 1)  # a coarse part that names nothing
    middle = torch.zeros(16, 16)
    middle[4:12, 4:12] = 1

    def label(row: Tensor) -> int:
        edges = (row[:, :, 1:] - row[:, :, :-1]).abs() * middle[:, 1:]
        return int(edges.mean() > 0.008)

    end, asked = climbed(aim((images, labels)), label)
    assert end is not None
    assert torch.equal(asked[0].rows[0], images[0])  # the nearest, as it is
    lines = [GREY + t * (images[0] - GREY) for t in torch.linspace(0.05, 1, 20)]
    straight = min(float(torch.dist(row, GREY)) for row in lines if label(row))
    assert float(torch.dist(end[0], GREY)) < 0.5 * straight


def test_a_new_piece_lacks_its_coarse_part() -> None:
    pieces = Pieces(aim(pictures(3)))
    for _ in range(10):
        edges = pieces.direction(pieces.new())
        assert edges.mean((1, 2)).abs().max() < 1e-5 * edges.abs().max() + 1e-6


def test_without_an_image_of_the_target_nothing_is_asked() -> None:
    images, labels = pictures(3)
    for pool in (None, (images, labels + 1), (images[:0], labels[:0])):
        assert climbed(task(GREY, target=1, pool=pool), lambda _: 1) == (None, [])


def test_a_climb_that_finds_nothing_asks_what_it_says() -> None:
    assert len(climbed(aim(), lambda _: 0)[1]) == 14
    assert len(climbed(aim(pictures(40, 8), GREY[:, :8, :8]), lambda _: 0)[1]) == RIVALS


@pytest.mark.parametrize("least", [None, 0.05])
def test_a_climb_ends_where_its_step_is_small(least: float | None) -> None:
    first = itertools.count()
    after = math.ceil(math.log((least or LEAST / math.sqrt(GREY.numel())) / STEP) / math.log(NARROWER) - 1e-9)
    assert len(climbed(aim(), lambda _: int(next(first) == 2), least)[1]) == 3 + after


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("known", [True, False], ids=["image", "none"])
def test_towards_a_target_in_linf_a_climb_ends_where_flips_begin(norm: Norm, known: bool) -> None:
    pool = pictures(1) if known else None
    of = task(GREY, norm, target=1, pool=pool, budget=200)
    first = itertools.count()
    _, asked = drive(approach(of, 0.5, 0.01), of, lambda rows: torch.tensor([int(next(first) == 0) for _ in rows]))
    kinds = [query.kind for query in asked]
    end = START if norm == "linf" else LEAST / math.sqrt(GREY.numel())
    climbing = 1 + math.ceil(math.log(end / STEP) / math.log(NARROWER) - 1e-9)
    flipping = math.ceil(math.log(FLIPS / GREY.numel() / START) / math.log(NARROWER) - 1e-9) if norm == "linf" else 0
    assert kinds[: climbing + flipping + 1] == ["init"] * (climbing + flipping) + ["line"]


def test_where_answers_are_random_a_row_must_reach_the_goal_twice() -> None:
    odd = itertools.count()
    end, asked = climbed(aim(stochastic=True), lambda _: next(odd) % 2)
    assert end is None
    assert len(asked) == 1 + 2 * 13  # all but the first reached it, and none again
    lucky = itertools.count()
    end, asked = climbed(aim(stochastic=True), lambda _: int(next(lucky) == 3))
    assert end is None
    assert len(asked) == 15  # one of the 14 was asked again
    assert torch.equal(asked[3].rows, asked[4].rows)


def test_a_row_that_is_refused_can_be_drawn_again() -> None:
    search = climb(aim())
    first = next(search)
    query = search.send(Answer.of(torch.tensor([1])))
    assert query.redraw is not None
    other = query.redraw([0])
    assert not torch.equal(other, query.rows)
    start = float(distance(first.rows - GREY, "l2"))
    assert float(distance(query.rows - GREY, "l2")) == pytest.approx(start * (1 - STEP), rel=1e-3)
    further = start * (1 - STEP * WIDER)  # not again as short a step
    assert float(distance(other - GREY, "l2")) == pytest.approx(further, rel=1e-3)
    after = search.send(Answer.of(torch.tensor([1])))  # nearer than what was drawn again, and reached the goal
    assert float(distance(after.rows - GREY, "l2")) < float(distance(other - GREY, "l2"))
    refused = Answer(torch.tensor([-1]), None, torch.tensor([REJECTED], dtype=torch.uint8))
    assert float(distance(search.send(refused).rows - GREY, "l2")) > float(distance(after.rows - GREY, "l2"))


def test_a_climb_ends_though_short_steps_are_refused() -> None:
    search, draws = climb(aim()), 0
    start = float(distance(next(search).rows - GREY, "l2"))
    answer = Answer.of(torch.tensor([1]))
    with pytest.raises(StopIteration):
        while draws < 500:
            query = search.send(answer)
            rows, draws, answer = query.rows, draws + 1, Answer.of(torch.tensor([0]))
            while (
                draws < 500 and float(distance(rows - GREY, "l2")) > 0.95 * start
            ):  # a gate that takes these for alike
                assert query.redraw is not None
                rows, draws = query.redraw([0]), draws + 1
        pytest.fail("it goes on")
    assert draws < 100


def test_images_of_the_target_that_the_model_takes_for_others_are_asked_once() -> None:
    of = aim(pictures(12))
    _, asked = drive(Waterfill().search(of), of, lambda rows: torch.zeros(len(rows), dtype=torch.long))
    rows = torch.cat([query.rows for query in asked])
    assert len(rows) > 12
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_towards_a_target_without_images_wavelets_climb_where_they_are_asked_to(norm: Norm) -> None:
    """A class that begins where fine waves are strong: the first ones are far, the end is near."""

    def label(row: Tensor) -> int:
        return int((row[:, :, 1:] - row[:, :, :-1]).abs().mean() > 0.02)

    of = task(GREY, norm, budget=2000, target=1)
    end, asked = drive(climb(of, Wavelets(of)), of, lambda rows: torch.tensor([label(row) for row in rows]))
    assert end is not None
    assert label(end[0]) == 1
    assert float(distance(end - GREY, norm)) < 0.2 * float(distance(asked[0].rows - GREY, norm))
    nothing, asked = drive(climb(of, Wavelets(of)), of, lambda rows: torch.zeros(len(rows), dtype=torch.long))
    assert nothing is None
    assert len(asked) == WAVES
    assert all(
        float(distance(query.rows - GREY, norm)) > 0.3 * (1 if norm == "linf" else 16 * 3**0.5) for query in asked
    )


def test_pieces_are_made_of_the_images_that_are_given() -> None:
    """A class that an edge in the middle makes, towards which only one picture with a far coarse part is known."""
    picture = torch.full((3, 16, 16), 0.9)
    picture[:, 6:10, 6:8], picture[:, 6:10, 8:10] = 0.0, 1.0

    def label(row: Tensor) -> int:
        return int(float((row[:, 6:10, 8] - row[:, 6:10, 7]).mean()) > 0.05)

    of = task(GREY, budget=2000, target=1)
    end, asked = drive(
        climb(of, Pieces(of, picture[None])), of, lambda rows: torch.tensor([label(row) for row in rows])
    )
    assert torch.equal(asked[0].rows[0], picture)
    assert end is not None
    assert label(end[0]) == 1
    assert float(torch.dist(end[0], GREY)) < 0.1 * float(torch.dist(picture, GREY))
