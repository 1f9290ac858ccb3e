"""Painting few pixels: exact counts, whole grey levels, rows and columns; and the two controls that see labels only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.pixels import PixelExhaustive, RandomPixels, corners, decode, exactly, paint, pixels_of
from robustbox.errors import InputError
from robustbox.protocol import Attack, Task
from tests.toys import HalfSpace

from .analytic import drive, task

SHAPES = [(3, 8, 8), (1, 5, 9), (3, 9, 4), (2, 6, 6)]


def image(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def eight_bit(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).float() / 255


def random_rows(of: Task, n: int, k: int) -> Tensor:
    genes = torch.rand(n, k, 2 + len(of.image), generator=of.generator)
    return paint(of, *decode(of, genes))


def changed(rows: Tensor, of: Task) -> Tensor:
    """bool [n,H,W]"""
    return (rows != of.image).any(dim=1)


# Decoding and painting.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 17, 20])
def test_exactly_k_pixels_change_to_whole_levels_and_the_rest_is_bit_identical(
    shape: tuple[int, int, int], k: int
) -> None:
    of = task(eight_bit(shape), "l0")
    rows = random_rows(of, 300, k)
    assert changed(rows, of).flatten(1).sum(dim=1).eq(k).all()
    whole = (rows * 255).round()
    assert rows.equal(whole.to(torch.uint8).float() / 255)


def test_a_float_image_keeps_its_other_pixels() -> None:
    of = task(image((3, 7, 5)), "l0")
    rows = random_rows(of, 200, 2)
    same = ~changed(rows, of)[:, None].expand_as(rows)
    assert rows[same].equal(of.image.expand_as(rows)[same])


def test_every_pixel_can_be_taken_at_once() -> None:
    of = task(eight_bit((3, 4, 5)), "l0")
    assert changed(random_rows(of, 50, 20), of).all()


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_extremes_corners_and_grey_levels_are_reached(levels: int) -> None:
    of = task(torch.full((3, 5, 7), 0.4), "l0", levels=levels)
    genes = torch.rand(20_000, 1, 5, generator=of.generator)
    positions, colours = decode(of, genes)
    assert positions.unique().equal(torch.arange(35))
    assert torch.bincount(positions.flatten()).min() > 20_000 / 35 * 0.8
    steps = (colours * (levels - 1)).round()
    assert colours.equal(steps / (levels - 1))
    for channel in range(3):
        values, counts = steps[..., channel].unique(return_counts=True)
        assert values.equal(torch.arange(float(levels)))
        assert counts.min() > 20_000 / levels * 0.4  # the extremes as often as the others


def test_the_faces_of_the_cube_are_the_extremes() -> None:
    of = task(torch.full((3, 5, 7), 0.4), "l0")
    positions, colours = decode(of, torch.stack([torch.zeros(1, 5), torch.ones(1, 5)]))
    assert positions.tolist() == [[0], [34]]
    assert colours.tolist() == [[[0, 0, 0]], [[1, 1, 1]]]


def test_rows_are_rows_and_columns_are_columns() -> None:
    of = task(torch.full((3, 5, 7), 0.5), "l0")
    genes = torch.tensor([[[3.5 / 5, 6.5 / 7, 1.0, 0.0, 1.0]]])
    row = paint(of, *decode(of, genes))[0]
    assert row[:, 3, 6].tolist() == [1, 0, 1]
    assert changed(row[None], of).sum() == 1


def test_taken_places_move_on_and_equal_colours_change_by_one_level() -> None:
    of = task(torch.tensor([0.0, 1.0, 100 / 255, 0.3]).view(1, 2, 2), "l0")
    places, colours = exactly(of, torch.tensor([[3, 3, 3]]), torch.tensor([[[0.0], [0.2], [0.4]]]))
    assert places.tolist() == [[1, 2, 3]]
    assert colours.flatten().tolist() == pytest.approx([0.0, 0.2, 0.4])
    places, colours = exactly(of, torch.tensor([[2, 0, 1]]), torch.tensor([[[100 / 255], [0.0], [1.0]]]))
    assert places.tolist() == [[0, 1, 2]]
    assert (colours.flatten() * 255).round().tolist() == [1, 254, 101]


def test_equal_sets_of_pixels_become_equal_candidates() -> None:
    of = task(eight_bit((3, 6, 6)), "l0")
    genes = torch.rand(50, 4, 5, generator=of.generator)
    shuffled = genes[:, torch.tensor([2, 0, 3, 1])]
    distinct = decode(of, genes)[0].diff(dim=1).gt(1).all(dim=1)  # none had to move
    for one, other in zip(decode(of, genes), decode(of, shuffled), strict=True):
        assert one[distinct].equal(other[distinct])


@pytest.mark.parametrize(
    ("pixels", "epsilon", "expected"), [(None, None, 1), (None, 5.0, 5), (None, 1e6, 24), (3, None, 3), (2, 2.0, 2)]
)
def test_number_of_pixels(pixels: int | None, epsilon: float | None, expected: int) -> None:
    assert pixels_of(task(image((3, 4, 6)), "l0", epsilon=epsilon), pixels) == expected


@pytest.mark.parametrize(
    ("pixels", "epsilon", "message"),
    [(3, 2.0, "epsilon allows 2"), (None, 0.5, "epsilon allows 0"), (25, None, "image has 24"), (25, 99.0, "has 24")],
)
def test_too_many_pixels_are_refused_before_any_query(pixels: int | None, epsilon: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(RandomPixels(pixels=pixels).search(task(image((3, 4, 6)), "l0", epsilon=epsilon)))


# The controls.


def lit(rows: Tensor) -> Tensor:
    """Class 1 where pixel (4, 2) is white in its first channel; labels only."""
    return (rows[:, 0, 4, 2] == 1).long()


@pytest.mark.parametrize("attack", [RandomPixels(colours="corners"), PixelExhaustive()])
@pytest.mark.parametrize("shape", [(1, 9, 6), (3, 9, 6)])
@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_controls_find_an_extreme_pixel_from_labels(
    attack: Attack, shape: tuple[int, int, int], epsilon: float | None
) -> None:
    images = torch.stack([eight_bit(shape, seed) * 0.9 for seed in range(3)])
    result = run_attack(lit, images, [0] * 3, attack=attack, norm="l0", epsilon=epsilon, budget=2000)
    assert result.success.all()
    assert (result.distance == 1).all()
    assert (result.adversarials[:, 0, 4, 2] == 1).all()
    assert (result.queries < 2000).all()  # nothing after the query of the first success
    assert (result.queries - result.first_success < 50).all()


def test_the_enumeration_is_complete_without_repetition_and_farthest_first() -> None:
    of = task(torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(1)).round(), "l0")
    of.image[:, 0, 0] = 0.25
    result, asked = drive(PixelExhaustive(batch=7).search(of), of, lambda rows: torch.zeros(len(rows)).long())
    assert result is None
    rows = torch.cat([query.rows for query in asked])
    assert len(rows) == 20 * 8 - 19  # the own colours of the 19 pixels that are corners
    assert changed(rows, of).flatten(1).sum(dim=1).eq(1).all()
    assert len(rows.flatten(1).unique(dim=0)) == len(rows)
    moved = (rows - of.image).abs().sum(dim=(1, 2, 3))
    assert moved[:20].min() > 2
    assert (moved[:20] >= moved[-19:].max()).all()


def test_the_enumeration_starts_in_the_centre() -> None:
    of = task(torch.full((1, 5, 7), 0.25), "l0")
    positions, _ = next(iter(corners(of)))
    assert positions[0] == 2 * 7 + 3
    assert set(positions[-4:, 0].tolist()) == {0, 6, 28, 34}


def test_random_pixels_spends_its_budget_to_the_row() -> None:
    images = torch.stack([eight_bit((3, 8, 8), seed) * 0.9 for seed in range(4)])
    result = run_attack(lambda rows: torch.zeros(len(rows)).long(), images, [0] * 4, "random-pixels", "l0", budget=123)
    assert result.queries.tolist() == [123] * 4
    assert not result.success.any()


@pytest.mark.parametrize("pixels", [1, 3])
@pytest.mark.parametrize("name", ["random-pixels"])
def test_random_pixels_hits_as_often_as_chance_says(name: str, pixels: int) -> None:
    images = torch.full((400, 1, 6, 6), 0.5)
    images[:, 0, 0, 0] = torch.arange(400) / 1000  # a stream of its own for every image

    def dark(rows: Tensor) -> Tensor:
        return (rows[:, 0, 3, 3] < 31.5 / 255).long()  # one position in 36, one level in 8

    result = run_attack(
        dark, images, [0] * 400, name, "l0", budget=50, max_rows=4096, attack_options={"pixels": pixels}
    )
    chance = 1 - (1 - pixels / 36 / 8) ** 50
    assert result.success.mean() == pytest.approx(chance, abs=5 * (chance * (1 - chance) / 400) ** 0.5)


@pytest.mark.parametrize(
    "options", [{"pixels": 0}, {"batch": 0}, {"colours": "pastel"}, {"pixels": -3}], ids=lambda o: str(o)
)
def test_options_that_mean_nothing(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        RandomPixels(**options)  # type: ignore[arg-type]


def test_the_batch_of_the_enumeration_is_checked() -> None:
    with pytest.raises(InputError, match="batch"):
        PixelExhaustive(batch=0)


def test_an_image_of_corner_colours_alone_has_no_empty_query() -> None:
    rows = (torch.stack([image((1, 4, 4), seed) for seed in range(2)]) > 0.5).float()
    result = run_attack(HalfSpace(threshold=2.0), rows, [0, 0], "pixel-exhaustive", norm="l0", budget=100)
    assert result.stop_reasons == ["finished"] * 2
    assert result.queries.tolist() == [16, 16]
