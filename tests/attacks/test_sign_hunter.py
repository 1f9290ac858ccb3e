"""SignHunter: the paper's chunks in the paper's order, exact on linear losses after one pass, one query a chunk."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.sign_hunter import SignHunter
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Norm, Query, Task

from .analytic import drive, task
from .slopes import Script, Slope, degenerate, flat_scores, three_bands

EPSILON: dict[Norm, float] = {"linf": 0.05, "l2": 1.0}
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
SHAPE = (3, 4, 5)


def grey(shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.4 + 0.3


def asked(of: Task, box: Any = None) -> list[Query]:
    _, queries = drive(SignHunter().search(of), of, box or Script())
    return queries


def lengths(n: int) -> list[int]:
    """The chunks of one pass over n bits, as Algorithm 1 has them."""
    levels = range(math.ceil(math.log2(n)) + 1)
    sizes = [math.ceil(n / 2**h) for h in levels]
    return [min(size, n - start) for size in sizes for start in range(0, n, size)]


def bits(row: Tensor, image: Tensor) -> Tensor:
    """The sign bits of a row [1,C,H,W] in the order in which the image is read: +-1 [n]."""
    return (row[0] - image).sign().permute(1, 2, 0).flatten()


@NORMS
def test_every_value_moves_by_the_same_size(norm: Norm) -> None:
    image = grey()
    for query in asked(task(image, norm, epsilon=EPSILON[norm], budget=100)):
        delta = query.rows - image
        size = EPSILON[norm] / (1 if norm == "linf" else math.sqrt(60))
        assert torch.allclose(delta.abs(), torch.tensor(size), atol=1e-6)
        assert distance(delta, norm) == pytest.approx(EPSILON[norm], rel=1e-4)


@pytest.mark.parametrize("shape", [SHAPE, (1, 8, 8), (1, 1, 1), (2, 1, 3)])
def test_a_pass_turns_all_chunks_level_by_level_and_costs_a_row_each(shape: tuple[int, int, int]) -> None:
    image = grey(shape)
    n = image.numel()
    expected = lengths(n)
    start, *flips = asked(task(image, "linf", epsilon=0.05, budget=1 + len(expected)))
    assert (bits(start.rows, image) == 1).all()
    assert len(expected) < 4 * n
    turned = [(bits(query.rows, image) == -1).nonzero().flatten().tolist() for query in flips]
    assert [len(chunk) for chunk in turned] == expected
    place = 0
    for chunk in turned:  # each level covers the bits from the first to the last
        assert chunk == list(range(place, place + len(chunk)))
        place = (place + len(chunk)) % n


@pytest.mark.parametrize(("norm", "target"), [("linf", None), ("l2", None), ("linf", 1)])
def test_one_pass_finds_the_sign_of_a_linear_loss(norm: Norm, target: int | None) -> None:
    """The paper's guarantee: after 2^(log n + 1) queries no sign vector is better, which is the optimum in linf."""
    slope = Slope(SHAPE, 0.2, classes=3)
    best = slope.optimum("linf") * (1 if norm == "linf" else math.sqrt(60))
    rows = 1 + len(lengths(60))
    for epsilon, reached in ((1.001 * best, True), (0.999 * best, False)):
        setting: dict[str, Any] = {"norm": norm, "epsilon": epsilon, "budget": rows, "targets": target}
        result = run_attack(slope, slope.images(8), [0] * 8, "sign-hunter", **setting)
        assert result.success.tolist() == [reached] * 8
    if target is None:
        of = task(slope.images(1)[0], norm, epsilon=0.5 * best, budget=rows + 40)
        stands = asked(of, slope.answer)[rows:]
        for query in stands:  # the second pass turns chunks of what is optimal already
            wrong = bits(query.rows, of.image) != slope.normal.permute(1, 2, 0).flatten().sign()
            assert int(wrong.sum()) in lengths(60)


def test_later_passes_start_anywhere_and_go_round() -> None:
    image = grey()
    one = len(lengths(60))
    queries = asked(task(image, "linf", epsilon=0.05, budget=1 + 20 * one))
    halves = [(bits(queries[2 + k * one].rows, image) == -1).nonzero().flatten() for k in range(20)]
    assert {len(half) for half in halves} == {30}
    assert halves[0].tolist() == list(range(30))
    firsts = {tuple(half.tolist()) for half in halves[1:]}
    assert len(firsts) > 10
    for half in halves:
        gaps = half.diff().ne(1).sum()
        assert gaps == 0 or (gaps == 1 and half[0] == 0 and half[-1] == 59)


@NORMS
def test_a_flip_is_kept_where_the_loss_falls_and_only_there(norm: Norm) -> None:
    box = Script([1.0, 0.9, 0.95, 0.5])  # all turned: kept; first half: not; second half: kept; first quarter
    image = grey((1, 4, 4))
    queries = asked(task(image, norm, epsilon=EPSILON[norm], budget=5), box)
    signs = [bits(query.rows, image).tolist() for query in queries]
    assert signs[1] == [-1.0] * 16
    assert signs[2] == [1.0] * 8 + [-1.0] * 8
    assert signs[3] == [-1.0] * 8 + [1.0] * 8
    assert signs[4] == [1.0] * 4 + [-1.0] * 4 + [1.0] * 8


@NORMS
def test_bits_of_saturated_values_are_remembered(norm: Norm) -> None:
    image = torch.tensor([0.0, 1.0, 0.5, 0.0]).view(1, 2, 2)
    box = Script([1.0, 0.9])
    queries = asked(task(image, norm, epsilon=0.1, budget=4), box)
    size = 0.1 if norm == "linf" else 0.05
    up, down = (image + size).clamp(0, 1), (image - size).clamp(0, 1)
    assert torch.allclose(queries[1].rows[0], down)
    assert torch.allclose(queries[2].rows[0, 0, 0], up[0, 0])
    assert torch.allclose(queries[2].rows[0, 0, 1], down[0, 1])


def test_success_is_seen_on_the_first_row() -> None:
    image = grey()

    def fragile(rows: Tensor) -> Tensor:
        same = (rows - image).abs().flatten(1).amax(dim=1) < 1e-3
        return torch.stack([same.float(), 1 - same.float()], dim=1)

    assert run_attack(fragile, image[None], [0], "sign-hunter", "linf", epsilon=0.05, budget=9).queries.tolist() == [1]


@NORMS
@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
def test_targets_are_reached(norm: Norm, loss: str) -> None:
    image = torch.full((1, 6, 6), 0.4)
    epsilon = {"linf": 0.2, "l2": 1.2}[norm]
    for target in (1, 2):
        setting: dict[str, Any] = {
            "epsilon": epsilon,
            "budget": 200,
            "targets": target,
            "attack_options": {"loss": loss},
        }
        result = run_attack(three_bands, image[None], [0], "sign-hunter", norm, **setting)
        assert result.success.all()
        assert three_bands(result.adversarials).argmax(dim=1).tolist() == [target]


# The knob, drawing again, refusals.


def test_the_knob_chunk_is_the_least_length() -> None:
    image = grey((1, 8, 8))
    search = SignHunter().search(task(image, "linf", epsilon=0.05))
    box = Script()
    start = next(search)
    query = search.send(box(start.rows))
    (chunk,) = query.knobs
    assert (chunk.name, chunk.low, chunk.high, chunk.integer) == ("chunk", 1, 32, True)
    for value in (1, 7, 32):
        drawn = (chunk.draw(value, 12) != start.rows).flatten(1)
        assert drawn.sum(dim=1).tolist() == [value] * 12
        assert len(drawn.unique(dim=0)) > 5
    chunk.value = 8
    seen = []
    for _ in range(60):
        query = search.send(box(query.rows))
        seen.append(int((query.rows != start.rows).sum()))
    one = [64, 32, 32, 16, 16, 16, 16, *[8] * 8]
    assert seen == (one * 5)[1:61]


def test_a_chunk_drawn_again_is_one_of_its_length_elsewhere() -> None:
    image = grey((1, 8, 8))
    search = SignHunter().search(task(image, "linf", epsilon=0.05))
    box = Script([1.0, 1.0, 0.5])
    start = next(search)
    assert start.redraw is not None
    assert 10 < (start.redraw([0]) != start.rows).sum() < 54
    query = search.send(box(start.redraw([0])))
    query = search.send(box(query.rows))
    assert query.redraw is not None
    again = query.redraw([0])
    assert not again.equal(query.rows)
    query = search.send(box(again))  # kept: the next chunk is turned from there
    assert (query.rows != again).sum() == 32


@NORMS
def test_refused_rows_teach_nothing(norm: Norm) -> None:
    def rows(spoil: float) -> list[Tensor]:
        box = Script([1.0, 0.9, 0.1, 0.8], {0, 2, 5}, spoil)
        asked(task(grey(), norm, epsilon=EPSILON[norm], budget=30), box)
        return box.asked

    one, other = rows(math.nan), rows(-50.0)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert len(one) == 30
    assert not one[0].equal(one[1])  # the refused start is drawn again


def test_stochastic_answers_are_compared_in_pairs() -> None:
    of = task(grey(), "linf", epsilon=0.05, budget=7, stochastic=True)
    box = Script([-9.0, 0.5, 1.0, 0.7, 0.6, 0.4, 0.6])
    start, first, second, third = asked(of, box)
    assert [len(query.rows) for query in (start, first, second, third)] == [1, 2, 2, 2]
    assert first.rows[1].equal(start.rows[0])
    assert second.rows[1].equal(first.rows[0])
    assert third.rows[1].equal(first.rows[0])


# The threat model.


@pytest.mark.parametrize("levels", [256, 32])
@pytest.mark.parametrize(
    ("norm", "size"), [("linf", 1.5), ("linf", 2.9), *(("l2", size) for size in (0.4, 1.0, 1.5, 2.9))]
)
def test_rows_stay_in_the_ball_after_rounding_and_fill_it_in_l2(norm: Norm, levels: int, size: float) -> None:
    steps = levels - 1
    image = (grey((3, 6, 7)) * steps).round() / steps
    radius = size / steps * (1 if norm == "linf" else math.sqrt(126))
    box = Script()
    asked(task(image, norm, epsilon=radius, budget=40, levels=levels), box)
    rows = (torch.stack(box.asked) * steps).round() / steps
    moved = ((rows - image).abs() * steps).round()
    least = int(size)
    if norm == "linf":
        assert (moved == least).all()
        return
    assert moved.eq(moved[0]).all()
    assert set(moved.unique().tolist()) <= {least, least + 1}
    far = distance(rows - image, "l2")
    assert (far <= radius * (1 + 1e-5)).all()
    assert (far**2 >= radius**2 - (2 * least + 1) / steps**2).all()


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_ball_of_few_grey_levels_has_a_bit_for_each_value_that_can_move(levels: int) -> None:
    """No row is asked twice before the pass is over, and all bits have their turn."""
    image = (grey((3, 6, 7)) * 255).round() / 255
    of = task(image, epsilon=math.sqrt(levels) / 255, budget=1 + len(lengths(levels)), levels=256)
    start, *flips = asked(of)
    turned = [int((query.rows != start.rows).sum()) for query in flips]
    assert turned == lengths(levels)
    assert (start.rows != image).sum() == levels


@NORMS
@pytest.mark.parametrize("kind", degenerate((3, 8, 8)))
def test_images_without_structure(norm: Norm, kind: str) -> None:
    image = degenerate((3, 8, 8))[kind]
    result = run_attack(flat_scores, image[None], [0], "sign-hunter", norm, epsilon=EPSILON[norm], budget=60)
    assert result.errors == [None]
    assert result.queries.tolist() == [60]


@pytest.mark.parametrize("budget", [1, 7, 100])
def test_budgets_are_spent_to_the_row(budget: int) -> None:
    slope = Slope(SHAPE, 5.0)
    result = run_attack(slope, slope.images(2), [0, 0], "sign-hunter", "linf", epsilon=0.05, budget=budget)
    assert result.queries.tolist() == [budget] * 2
    assert slope.rows == 2 * (budget + 1)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean margin"):
        SignHunter(loss="margins")  # type: ignore[arg-type]
