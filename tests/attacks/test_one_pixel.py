"""The one-pixel attacks on models whose weak pixel is planted, and on a trained network against the full enumeration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import load_data, load_model, run_attack
from robustbox.attacks import moves
from robustbox.attacks.one_pixel import OnePixel
from robustbox.attacks.one_pixel_fast import OnePixelFast
from robustbox.attacks.pixels import PixelExhaustive, RandomPixels
from robustbox.errors import InputError
from robustbox.protocol import REJECTED, Answer, Attack
from robustbox.results import AttackResult

from .analytic import drive, task

Box = Callable[[Tensor], Tensor]
GREY = 128 / 255
PAPER, BEST1, FAST = OnePixel(), OnePixel(preset="best1"), OnePixelFast()


class Planted:
    """Class 1 only where pixel `place` is magenta: r >= 240, g <= 15, b >= 240 (of 255). Counts rows.

    p_0 falls smoothly with the nearness of a changed pixel, in place and colour, but stays above one half.
    """

    place = (20, 9)

    def __init__(self, height: int = 32, width: int = 32, classes: int = 2) -> None:
        y, x = torch.arange(height)[:, None] - self.place[0], torch.arange(width) - self.place[1]
        near = torch.exp(-(y.square() + x.square()).sqrt() / 8)
        self.weights = (near * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1) / 1.5).flatten()
        self.size, self.classes, self.rows = (height, width), classes, 0

    def images(self, n: int) -> Tensor:
        """Grey images that differ in one faint pixel, so that each has a stream of its own."""
        images = torch.full((n, 3, *self.size), GREY)
        images[torch.arange(n), 0, 0, torch.arange(n)] = 127 / 255
        return images

    def __call__(self, rows: Tensor) -> Tensor:
        self.rows += len(rows)
        p = 0.75 - 0.2 * ((rows - GREY).flatten(1) @ self.weights)
        r, g, b = (rows[:, :, *self.place] * 255).round().unbind(1)
        p = torch.where((r >= 240) & (g <= 15) & (b >= 240), 0.05, p)
        return torch.stack([p, 1 - p], dim=1)


def scored(scores: Tensor) -> Answer:
    return Answer.of(scores.argmax(dim=1), scores)


def flat(rows: Tensor) -> Tensor:
    """Scores that never change."""
    return torch.tensor([0.9, 0.1]).expand(len(rows), 2)


def run(box: Box, images: Tensor, attack: Attack | str, budget: int, **setting: Any) -> AttackResult:
    return run_attack(box, images, [0] * len(images), attack, "l0", budget=budget, **{"max_rows": 400, **setting})


# The planted pixel: 2.4e-7 of all candidates succeed.


@pytest.fixture(scope="module", params=[PAPER, BEST1, FAST], ids=["paper", "best1", "fast"])
def hunt(request: pytest.FixtureRequest) -> tuple[AttackResult, int]:
    """20 runs of an attack with a budget of 40,400 rows each, and the rows that the box saw."""
    box = Planted()
    return run(box, box.images(20), request.param, budget=40_400), box.rows


def test_finds_the_planted_pixel_in_18_of_20_runs(hunt: tuple[AttackResult, int]) -> None:
    result, rows = hunt
    assert result.success.sum() >= 18
    won = result.adversarials[torch.from_numpy(result.success)]
    assert (won[:, :, *Planted.place] * 255).round().sub(torch.tensor([255, 0, 255])).abs().max() <= 15
    assert (result.distance[result.success] == 1).all()
    assert sum(result.ledger.values()) == rows


def test_random_pixels_do_not_find_it_at_the_same_cost(hunt: tuple[AttackResult, int]) -> None:
    box, cost = Planted(), int(np.median(hunt[0].queries))
    result = run(box, box.images(20), "random-pixels", budget=cost)
    assert result.success.sum() <= 2
    assert (result.queries[~result.success] == cost).all()


def test_the_fast_variant_takes_a_tenth_of_the_rows() -> None:
    box = Planted()
    images = box.images(3)
    slow, fast = (run(box, images, attack, budget=40_400) for attack in (BEST1, FAST))
    assert slow.success.all()
    assert fast.success.all()
    assert fast.first_success.max() <= 0.1 * np.median(slow.first_success)


def test_rows_and_columns_are_not_mixed_up() -> None:
    box = Planted(height=24, width=12)  # the place (9, 20) does not exist
    result = run(box, box.images(3), BEST1, budget=40_400)
    assert result.success.all()


def test_eight_bits_change_nothing() -> None:
    box = Planted()
    plain, rounded = (run(box, box.images(2), BEST1, budget=4000, levels=levels) for levels in (None, 256))
    assert plain.first_success.tolist() == rounded.first_success.tolist()


# Every row.


class Recorder:
    """Flat scores; keeps the rows."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.seen.append(rows.clone())
        return torch.stack([0.8 - 0.1 * rows.flatten(1).mean(dim=1), 0.2 + 0.1 * rows.flatten(1).mean(dim=1)], dim=1)


def eight_bit(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8).float() / 255


def asked(attack: Attack, image: Tensor, budget: int, seed: int = 0) -> Tensor:
    """The rows of a run without success."""
    box = Recorder()
    run(box, image[None], attack, budget=budget, seed=seed)
    return torch.cat(box.seen)[1:]  # the first is the clean check


@pytest.mark.parametrize("shape", [(3, 9, 6), (1, 6, 9)])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("preset", ["paper", "best1"])
def test_every_row_changes_exactly_k_pixels_to_whole_levels(preset: Any, k: int, shape: tuple[int, int, int]) -> None:
    image = eight_bit(shape)
    rows = asked(OnePixel(pixels=k, preset=preset, population=40), image, 600)
    assert len(rows) == 600
    assert (rows != image).any(dim=1).flatten(1).sum(dim=1).eq(k).all()
    assert rows.equal((rows * 255).round().to(torch.uint8).float() / 255)


@pytest.mark.parametrize("shape", [(3, 9, 6), (1, 9, 12)])
@pytest.mark.parametrize("k", [1, 3])
def test_the_fast_variant_asks_no_candidate_twice_and_up_to_k_pixels(k: int, shape: tuple[int, int, int]) -> None:
    image = eight_bit(shape)
    rows = asked(OnePixelFast(pixels=k, patience=40), image, 300)
    changed = (rows != image).any(dim=1).flatten(1).sum(dim=1)
    assert len(rows.unique(dim=0)) == len(rows) == 300
    assert changed.unique().tolist() == list(range(1, k + 1))
    assert rows.equal((rows * 255).round().to(torch.uint8).float() / 255)


@pytest.mark.parametrize("preset", ["paper", "best1"])
def test_both_extremes_and_all_corners_are_in_the_start(preset: Any) -> None:
    of = task(torch.full((3, 5, 7), 0.4), "l0")
    query = next(OnePixel(preset=preset, population=5000).search(of))
    changed = query.rows != of.image
    for row, column in [(0, 0), (0, -1), (-1, 0), (-1, -1)]:
        assert changed[:, :, row, column].any()
    for channel in range(3):
        values = query.rows[:, channel][changed[:, channel]]
        share = torch.stack([(values == 0).float().mean(), (values == 1).float().mean()])
        expected = 0.157 if preset == "paper" else 1 / 256  # the clipped tails of N(128, 127)
        assert torch.allclose(share, torch.tensor(expected), rtol=0.0, atol=0.02)
        assert (share > 0).all()


# The count.


@pytest.mark.parametrize("preset", ["paper", "best1"])
@pytest.mark.parametrize("generations", [0, 1, 4])
def test_costs_population_times_generations_plus_one(preset: Any, generations: int) -> None:
    attack = OnePixel(preset=preset, population=30, generations=generations)
    of = task(torch.full((3, 6, 6), 0.5), "l0", budget=10**6)
    _, asked = drive(attack.search(of), of, lambda rows: scored(flat(rows)))
    assert [len(query.rows) for query in asked] == [30] * (generations + 1)


@pytest.mark.parametrize(("preset", "generations"), [("paper", 100), ("best1", 75)])
def test_the_presets_have_the_generations_of_their_sources(preset: Any, generations: int) -> None:
    of = task(torch.full((1, 3, 3), 0.5), "l0", budget=10**6)
    _, asked = drive(OnePixel(preset=preset, population=4).search(of), of, lambda rows: scored(flat(rows)))
    assert len(asked) == generations + 1


@pytest.mark.parametrize("attack", [OnePixel(population=40), FAST, RandomPixels(), PixelExhaustive()], ids=str)
@pytest.mark.parametrize("budget", [1, 39, 40, 41, 97])
@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_budgets_hold_to_the_row_also_inside_a_generation(attack: Attack, budget: int, epsilon: float | None) -> None:
    box = Recorder()
    images = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    result = run(box, images, attack, budget=budget, epsilon=epsilon)
    assert result.queries.tolist() == [budget] * 3
    assert sum(map(len, box.seen)) == 3 * (budget + 1)
    assert result.stop_reasons == ["budget"] * 3


@pytest.mark.parametrize("epsilon", [None, 1.0, 4.0])
def test_a_success_in_the_first_population_costs_the_population(epsilon: float | None) -> None:
    def fragile(rows: Tensor) -> Tensor:
        hit = (rows != 0.5).any(dim=1)[:, :3].flatten(1).any(dim=1).float()
        return torch.stack([0.9 - 0.8 * hit, 0.1 + 0.8 * hit], dim=1)

    result = run(fragile, torch.full((1, 3, 6, 6), 0.5), OnePixel(pixels=1), budget=5000, epsilon=epsilon)
    assert result.queries.tolist() == [400]
    assert 1 <= result.first_success[0] < 20
    assert result.distance.tolist() == [1]


def test_queries_of_bounded_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Planted()
    images = box.images(2)
    whole = run(box, images, BEST1, budget=10_000)
    monkeypatch.setattr("robustbox.attacks.pixels.ROW_BYTES", 70 * images[0].numel() * 4)
    of = task(images[0], "l0")
    assert [len(next(BEST1.search(of)).rows)] == [70]
    split = run(box, images, BEST1, budget=10_000)
    assert whole.first_success.tolist() == split.first_success.tolist()
    assert whole.adversarials.equal(split.adversarials)
    assert moves.ROW_BYTES >= 400 * 3 * 32 * 32 * 4  # a population of the paper on CIFAR-10 is one query


# Success is the label, on any row.


def trap(rows: Tensor) -> Tensor:
    """A white pixel (0, 0) is least like class 0, which still wins; a dark one at (5, 5) is most like it, but class 2 wins."""
    light, dark = rows[:, :, 0, 0].mean(dim=1), (rows[:, :, 5, 5] < 0.1).any(dim=1).float()
    p0, p2 = 0.46 - 0.05 * light + 0.02 * dark, 0.2 + 0.33 * dark
    return torch.stack([p0, 1 - p0 - p2, p2], dim=1)


@pytest.mark.parametrize("attack", [PAPER, BEST1, FAST], ids=["paper", "best1", "fast"])
def test_a_misclassified_row_counts_even_where_another_has_the_lower_loss(attack: Attack) -> None:
    result = run(trap, torch.full((1, 3, 6, 6), 0.5), attack, budget=400)
    assert result.success.all()
    assert (result.adversarials[0, :, 5, 5] < 0.1).any()


@pytest.mark.parametrize("attack", [PAPER, BEST1, FAST], ids=["paper", "best1", "fast"])
def test_targeted_success_is_the_target(attack: Attack) -> None:
    def three(rows: Tensor) -> Tensor:
        """Class 1 is everywhere a white pixel away; class 2 only at (2, 3), in red."""
        whites = rows.amin(dim=1).flatten(1).amax(dim=1)
        redness = (rows[:, 0, 2, 3] - rows[:, 1:, 2, 3].mean(dim=1)).clamp(min=0)
        near = (rows != 0.5).any(dim=1)[:, 1:4, 2:5].flatten(1).any(dim=1).float()
        logits = torch.stack([torch.ones(len(rows)), 4 * whites - 2, 1.6 * redness + 0.2 * near], dim=1)
        return logits.softmax(dim=1)

    images = torch.full((4, 3, 6, 6), 0.5)
    images[:, 0, 0, 0] += torch.arange(4) / 1000
    result = run(three, images, attack, budget=20_000, targets=2)
    assert result.success.sum() == 4
    assert three(result.adversarials).argmax(dim=1).eq(2).all()
    assert run(three, images, attack, budget=20_000).success.all()


@pytest.mark.parametrize("attack", [PAPER, BEST1], ids=["paper", "best1"])
def test_flat_scores_cost_the_blind_budget_and_no_exception(attack: OnePixel) -> None:
    result = run(flat, torch.full((1, 3, 6, 6), 0.5), attack, budget=10**6)
    assert not result.success.any()
    assert result.queries[0] == 400 * (101 if attack.preset == "paper" else 76)
    assert result.stop_reasons == ["finished"]
    assert result.errors == [None]


@pytest.mark.parametrize(
    ("levels", "candidates"),
    [(None, 30 * 9 - 1), (3, 30 * 9 - 30), (2, 30 * 4 - 30)],  # less those that paint a pixel in its own colour
)
def test_the_fast_variant_asks_its_whole_palette_once_and_ends(levels: int | None, candidates: int) -> None:
    box = Recorder()
    images = torch.full((1, 2, 5, 6), 0.3)
    images[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    result = run(box, images, OnePixelFast(palette=3), budget=10**6, levels=levels)
    assert result.queries.tolist() == [candidates]
    assert result.stop_reasons == ["finished"]
    assert len(torch.cat(box.seen).unique(dim=0)) == candidates + 1


def test_the_fast_variant_ends_with_several_pixels_too() -> None:
    result = run(Recorder(), torch.full((1, 1, 3, 3), 0.3), OnePixelFast(pixels=2, palette=2), budget=10**6)
    pairs_and_singles = 9 * 8 // 2 * 4 + 18
    assert 18 < result.queries[0] <= pairs_and_singles
    assert result.stop_reasons == ["finished"]


def test_labels_are_refused_as_too_little() -> None:
    with pytest.raises(InputError, match="needs scores"):
        run(flat, torch.full((1, 3, 6, 6), 0.5), PAPER, budget=10, knowledge="label")


@pytest.mark.parametrize("attack", [OnePixel(population=20), OnePixelFast(batch=5)], ids=["de", "fast"])
def test_rows_that_are_not_answered_teach_nothing(attack: Attack) -> None:
    def gate(rows: Tensor) -> Answer:
        """Refuses bright pixels, with scores that would lead there."""
        refused = (rows > 0.9).flatten(1).any(dim=1)
        scores = torch.where(refused[:, None], torch.tensor([torch.nan, torch.nan]), flat(rows))
        return Answer(torch.where(refused, -1, 0), scores, torch.where(refused, REJECTED, 0).to(torch.uint8))

    of = task(torch.full((1, 6, 6), 0.5), "l0", budget=500)
    _, asked = drive(attack.search(of), of, gate)
    assert sum(len(query.rows) for query in asked) > 80


# Independence, and options.


@pytest.mark.parametrize(
    "attack", [OnePixel(population=30), OnePixel(population=30, preset="best1"), FAST, RandomPixels(pixels=2)], ids=str
)
def test_the_same_alone_and_among_others(attack: Attack) -> None:
    box = Planted()
    images = box.images(9)
    together = run(box, images, attack, budget=700, max_rows=64)
    for i in (0, 8):
        alone = run(box, images[i : i + 1], attack, budget=700)
        assert alone.traces[0] == together.traces[i]
        assert alone.queries[0] == together.queries[i]
        assert alone.adversarials.nan_to_num(-1).equal(together.adversarials[i : i + 1].nan_to_num(-1))
    again = run(box, images, attack, budget=700)
    assert again.first_success.tolist() == together.first_success.tolist()


@pytest.mark.parametrize("attack", [PAPER, BEST1, RandomPixels()], ids=["paper", "best1", "random"])
def test_the_seed_is_the_only_chance(attack: Attack) -> None:
    image = eight_bit((3, 6, 6))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    rows = asked(attack, image, 450)
    assert rows.equal(asked(attack, image, 450))
    assert not rows.equal(asked(attack, image, 450, seed=1))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": 0}, "pixels must be at least 1"),
        ({"preset": "papper"}, "unknown preset 'papper': did you mean paper"),
        ({"population": 3}, "population must be at least 4"),
        ({"preset": "best1", "population": 2}, "population must be at least 3"),
        ({"generations": -1}, "generations must be at least 0"),
        ({"loss": "hinge"}, "unknown loss"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnePixel(**options)


@pytest.mark.parametrize("option", ["pixels", "grid", "patience", "batch"])
def test_fast_options_that_mean_nothing(option: str) -> None:
    with pytest.raises(InputError, match=f"{option} must be at least 1"):
        OnePixelFast(**{option: 0})


@pytest.mark.parametrize("name", ["one-pixel", "one-pixel-fast"])
def test_three_pixels_by_name(name: str) -> None:
    box = Recorder()
    options = {"attack_options": {"pixels": 3}}
    assert run(box, torch.full((1, 3, 6, 6), 0.5), name, budget=500, **options).queries.tolist() == [500]


# A trained network: the zoo's digits.


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Tensor, Tensor]:
    data = load_data("digits")
    return load_model("digits-cnn"), data.images[:30], data.labels[:30]


def rate(digits: tuple[Any, Tensor, Tensor], attack: Attack, budget: int) -> set[int]:
    model, images, labels = digits
    return set(np.flatnonzero(run_attack(model, images, labels, attack, "l0", budget=budget).success))


def test_breaks_what_the_enumeration_breaks_and_more_with_more(digits: tuple[Any, Tensor, Tensor]) -> None:
    corners = rate(digits, PixelExhaustive(), 128)
    de = rate(digits, OnePixel(generations=4), 10**5)
    tiny = rate(digits, OnePixel(preset="best1", population=5, generations=10), 10**5)
    fast = rate(digits, FAST, 10**5)
    three = rate(digits, OnePixel(pixels=3, generations=4), 10**5)
    assert len(corners) >= 3
    assert len(de & corners) >= 0.9 * len(corners)
    assert fast >= corners  # the palette holds the corners
    assert len(three) > len(de)
    assert len(tiny) < len(de)


def test_twice_the_rows_never_break_fewer_beyond_noise(digits: tuple[Any, Tensor, Tensor]) -> None:
    once = rate(digits, OnePixel(population=100, generations=4), 10**5)
    for attack in (OnePixel(population=100, generations=9), OnePixel(population=200, generations=4)):
        assert len(rate(digits, attack, 10**5)) >= max(len(once) - 2, 1)
