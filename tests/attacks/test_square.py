"""Square Attack: the paper's proposals and schedule, one query each, kept where they help, inside the ball."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.painters import LEAST_SIDE, bump
from robustbox.attacks.square import HALVINGS, PATIENCE, Square, side_share
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import Norm, Query, Task

from .analytic import drive, task
from .slopes import Script, Slope, degenerate, flat_scores, three_bands

EPSILON: dict[Norm, float] = {"linf": 0.05, "l2": 1.0}
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def grey(shape: tuple[int, int, int] = (3, 20, 24)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.4 + 0.3


def asked(of: Task, box: Any = None, attack: Square | None = None) -> list[Query]:
    _, queries = drive((attack or Square()).search(of), of, box or Script())
    return queries


def changed(query: Query, start: Tensor) -> Tensor:
    """Where a proposal differs from the incumbent, in any channel: bool [H,W]."""
    return (query.rows != start).any(dim=1)[0]


def extent(where: Tensor) -> tuple[int, int]:
    """Height and width of the smallest rectangle around what is True."""
    rows, columns = where.nonzero().T
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


# linf


def test_linf_starts_with_vertical_stripes_of_one_pixel() -> None:
    image = grey()
    start = next(Square().search(task(image, "linf", epsilon=0.05)))
    delta = start.rows[0] - image
    assert start.kind == "init"
    assert torch.allclose(delta.abs(), torch.tensor(0.05), atol=1e-6)
    assert torch.equal(delta.sign(), delta.sign()[:, :1].expand_as(delta))
    assert delta[:, 0].sign().unique(dim=1).shape[1] == 8  # all colours occur among 24 stripes


def test_linf_proposals_are_squares_of_one_colour_that_change_something() -> None:
    image = grey()
    start, *steps = asked(task(image, "linf", epsilon=0.05, budget=400))
    assert len(steps) == 399
    edges = torch.zeros(4, dtype=torch.bool)
    for query in steps:
        where = changed(query, start.rows)
        assert where.any()
        height, width = extent(where)
        assert max(height, width) <= 5  # sqrt(0.05 * 480) = 4.9
        colour = (query.rows - image).sign()[0][:, where]
        assert torch.equal(colour, colour[:, :1].expand_as(colour)) or (changed_channels(query, start) == 1)
        assert torch.allclose((query.rows - image).abs(), torch.tensor(0.05), atol=1e-6)
        edges |= torch.stack([edge.any() for edge in (where[0], where[-1], where[:, 0], where[:, -1])])
    assert edges.all()  # windows reach the last row and column


def changed_channels(query: Query, start: Query) -> int:
    return int((query.rows != start.rows).flatten(2).any(dim=2).sum())


def test_a_square_that_would_change_nothing_turns_one_channel_over() -> None:
    image = torch.full((2, 1, 1), 0.5)
    start, *steps = asked(task(image, "linf", epsilon=0.05, budget=200))
    flips = [tuple((query.rows != start.rows).flatten().tolist()) for query in steps]
    assert set(flips) == {(True, False), (False, True), (True, True)}
    assert 30 < flips.count((True, True)) < 70  # the one in four that was drawn so


def test_the_schedule_runs_by_queries_over_the_budget() -> None:
    """In the paper p is halved at 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries."""
    assert [round(10_000 * share) for share in HALVINGS] == [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    assert [side_share(0.8, q / 10_000) for q in (10, 11, 50, 51, 10_000)] == [0.8, 0.4, 0.4, 0.2, 0.8 / 512]
    image = grey((1, 40, 40))
    for budget, stochastic in ((500, False), (1000, True)):
        of = task(image, "linf", epsilon=0.05, budget=budget, stochastic=stochastic)
        start, *steps = asked(of, attack=Square(p=0.8, horizon=budget))
        spent, sides = 1, []
        for query in steps:
            sides.append((spent / budget, max(extent((query.rows[:1] != start.rows).any(dim=1)[0]))))
            spent += len(query.rows)
        for low, high in zip((0, *HALVINGS), (*HALVINGS, 1), strict=True):
            expected = round(math.sqrt(side_share(0.8, high) * 1600))
            within = [side for share, side in sides if low < share <= high]
            assert not within or max(within) == expected or (len(within) < 3 and max(within) <= expected)


def test_a_small_budget_sees_the_beginning_of_the_papers_schedule() -> None:
    default, longest = (
        asked(task(grey((1, 40, 40)), "linf", epsilon=0.05, budget=60), attack=Square(horizon=horizon))
        for horizon in (None, 10_000)
    )
    assert all((a.rows == b.rows).all() for a, b in zip(default, longest, strict=True))


def test_a_longer_horizon_keeps_windows_large_and_a_shorter_one_ends_small() -> None:
    image = grey((1, 40, 40))
    for horizon, least, most in ((10**6, 33, 36), (10, 1, 2)):
        start, *steps = asked(task(image, "linf", epsilon=0.05, budget=60), attack=Square(p=0.8, horizon=horizon))
        sides = [max(extent(changed(query, start.rows))) for query in steps[-30:]]
        assert least <= max(sides) <= most


# l2


@pytest.mark.parametrize("side", [1, 2, 3, 7, 10])
def test_a_bump_has_length_one_and_a_hill_of_each_sign(side: int) -> None:
    tile = bump(side, torch.device("cpu"))
    assert tile.shape == (side, side)
    assert tile.norm() == pytest.approx(1)
    assert (tile[: side // 2] > 0).all()
    assert (tile[side // 2 :] < 0).all()


def test_the_hills_of_a_bump_are_those_of_the_paper() -> None:
    """A hill of 3 x 6 peaks at its middle (1, 3); at distance r the sum of 1/k^2 from k = r + 1 to 4 is left."""
    hill = bump(6, torch.device("cpu"))[:3] * math.sqrt(2)
    tail = [sum(1 / k**2 for k in range(r + 1, 5)) for r in range(4)]
    expected = torch.tensor([[tail[max(abs(i - 1), abs(j - 3))] for j in range(6)] for i in range(3)])
    assert torch.allclose(hill, expected / expected.norm(), atol=1e-6)


def test_l2_starts_with_a_grid_of_bumps_on_the_sphere() -> None:
    image = grey((3, 32, 32))
    start = next(Square().search(task(image, "l2", epsilon=1.0)))
    delta = start.rows[0] - image
    assert delta.norm() == pytest.approx(1, rel=1e-4)
    assert not delta[:, [0, -1]].any()  # 5 x 5 tiles of 6 x 6 leave a margin of 1
    tiles = delta[:, 1:-1, 1:-1].unfold(1, 6, 6).unfold(2, 6, 6).flatten(0, 2)
    shape = tiles / tiles.flatten(1).norm(dim=1).view(-1, 1, 1)
    tile = bump(6, torch.device("cpu"))
    kinds = torch.stack([tile, -tile, tile.T, -tile.T])
    nearest = (shape[:, None] - kinds).flatten(2).norm(dim=2)
    assert nearest.amin(dim=1).max() < 1e-3
    assert nearest.argmin(dim=1).unique().tolist() == [0, 1, 2, 3]


def test_l2_proposals_move_all_mass_of_two_windows_into_one() -> None:
    image = grey((3, 32, 32))
    start, *steps = asked(task(image, "l2", epsilon=1.0, budget=300))
    old = start.rows[0] - image
    for query in steps:
        new = query.rows[0] - image
        assert new.norm() == pytest.approx(1, rel=1e-4)
        emptied = (new == 0).all(dim=0) & (old != 0).any(dim=0)
        moved = (new - old).abs().amax(dim=0) > 1e-5
        assert moved.sum() <= 2 * 11 * 11
        # a channel's mass stays in the windows: outside nothing moves
        assert torch.allclose(new.square().sum(dim=(1, 2)), old.square().sum(dim=(1, 2)), atol=1e-4)
        assert not (emptied & ~moved).any()
    assert any(((query.rows[0] - image == 0).all(dim=0) & (old != 0).any(dim=0)).any() for query in steps)


def test_l2_spends_what_clipping_left_of_epsilon() -> None:
    image = grey((1, 24, 24)).round()  # black and white: half of every bump is cut off
    queries = asked(task(image, "l2", epsilon=1.0, budget=100), Script([1.0 - k / 200 for k in range(100)]))
    lengths = [float((query.rows - image).norm()) for query in queries]
    assert lengths[0] < 0.8
    assert max(lengths) <= 1 + 1e-5
    assert lengths[-1] > lengths[0]


def test_l2_windows_are_odd_and_at_least_three() -> None:
    image = grey((1, 16, 16))
    start, *steps = asked(task(image, "l2", epsilon=0.5, budget=400), attack=Square(p=0.02))
    last = [extent((query.rows - start.rows).abs().amax(dim=1)[0] > 1e-6) for query in steps[-100:]]
    assert all(height >= LEAST_SIDE for height, _ in last)
    touched = [int(((query.rows - start.rows).abs().amax(dim=1) > 1e-6).sum()) for query in steps[-100:]]
    assert max(touched) <= 18


# What is kept.


@NORMS
def test_a_proposal_is_kept_where_the_loss_falls_and_only_there(norm: Norm) -> None:
    box = Script([1.0, 2.0, 0.9, 0.9, 0.95, 0.5, 0.6])
    asked(task(grey((3, 12, 12)), norm, epsilon=EPSILON[norm], budget=7), box)
    rows, stands = box.asked, [0, 0, 2, 2, 2, 5]  # on which row the next proposal stands
    for k, base in zip(range(1, 7), stands, strict=True):
        different = [int((rows[k] - rows[other]).abs().gt(1e-5).sum()) for other in range(k)]
        assert different[base] == min(different)


@NORMS
def test_success_is_seen_on_the_first_row(norm: Norm) -> None:
    image = grey((1, 10, 10))

    def fragile(rows: Tensor) -> Tensor:
        same = (rows - image).abs().flatten(1).amax(dim=1) < 1e-3
        return torch.stack([same.float(), 1 - same.float()], dim=1)

    result = run_attack(fragile, image[None], [0], "square", norm, epsilon=EPSILON[norm], budget=50)
    assert result.queries.tolist() == [1]
    assert result.first_success.tolist() == [1]


@pytest.mark.parametrize("targets", [None, 1])
def test_linf_succeeds_a_quarter_beyond_the_optimum(targets: int | None) -> None:
    slope = Slope((3, 8, 8), 0.5)
    epsilon = 1.25 * slope.optimum("linf")
    result = run_attack(
        slope, slope.images(8), [0] * 8, "square", "linf", epsilon=epsilon, budget=2500, targets=targets
    )
    assert result.success.all()
    assert (result.queries > 20).all()


@NORMS
@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
def test_targets_are_reached(norm: Norm, loss: str) -> None:
    images = torch.stack([grey((1, 12, 12)), grey((1, 12, 12)).flip(2)]) - 0.1
    for target in (1, 2):
        result = run_attack(
            three_bands, images, [0, 0], "square", norm, epsilon={"linf": 0.2, "l2": 3.0}[norm], budget=600,
            targets=target, attack_options={"loss": loss, "horizon": 600},
        )  # fmt: skip
        assert result.success.all()
        assert three_bands(result.adversarials).argmax(dim=1).tolist() == [target] * 2


# Knobs, drawing again, refusals.


def test_the_knob_squares_is_the_number_of_windows() -> None:
    image = grey((3, 32, 32))
    search = Square().search(task(image, "linf", epsilon=0.05))
    box = Script()
    start = next(search)
    query = search.send(box(start.rows))
    _, squares, _ = query.knobs
    assert (squares.name, squares.low, squares.high, squares.integer) == ("squares", 1, 100, True)
    share = [float((squares.draw(k, 20) != start.rows).any(dim=1).float().mean()) for k in (1, 10, 100)]
    cover = [
        1 - (1 - 49 / 1024) ** k for k in (1, 10, 100)
    ]  # 7 x 7; but for the edges, and colours that are there already
    assert share == pytest.approx([0.95 * c for c in cover], rel=0.2)
    squares.value = 100
    query = search.send(box(query.rows))
    assert changed(query, start.rows).float().mean() > 0.8
    assert len(squares.draw(3, 4).unique(dim=0)) == 4


def test_the_knob_speckle_turns_values_over_and_the_search_starts_anew_where_nothing_wins() -> None:
    image = grey((3, 32, 32))
    of = task(image, "linf", epsilon=0.05)
    search = Square().search(of)
    box = Script([0.5])  # no other row is better than 1
    start = next(search)
    query = search.send(box(start.rows))
    speckle = query.knobs[0]
    assert (speckle.name, speckle.low, speckle.high, speckle.integer) == ("speckle", 0.002, 0.5, False)
    for share in (0.01, 0.1, 0.5):
        rows = speckle.draw(share, 20)
        assert float((rows - image).abs().max()) <= 0.05 + 1e-6
        squares = 49 / 1024 / 2  # of the values; half of them have the colour already
        expected = share + squares * (1 - 2 * share)
        assert float((rows - start.rows).abs().gt(0.05).float().mean()) == pytest.approx(expected, rel=0.15)
    speckle.value, kinds = 0.1, []
    for _ in range(2 + 3 * PATIENCE):
        query = search.send(box(query.rows))
        kinds.append(query.kind)
    assert [i for i, kind in enumerate(kinds) if kind == "init"] == [PATIENCE - 1, 3 * PATIENCE]
    assert changed(query, start.rows).float().mean() > 0.8


@NORMS
def test_the_knob_side_is_the_least_side_up_to_the_whole_image(norm: Norm) -> None:
    image = grey((3, 10, 16))
    search = Square().search(task(image, norm, epsilon=EPSILON[norm]))
    box = Script()
    start = next(search)
    query = search.send(box(start.rows))
    *_, side = query.knobs
    assert (side.name, side.low, side.high, side.integer) == ("side", 1, 5, True)
    if norm == "linf":
        drawn = [extent((row != start.rows[0]).any(dim=0)) for row in side.draw(2, 30)]
        assert max(max(pair) for pair in drawn) == 2  # also below the schedule's 3
    for value in (9, 10, 16, 100):
        side.value = value
        for _ in range(20):
            query = search.send(box(query.rows))
            assert distance(query.rows - image, norm) <= EPSILON[norm] * (1 + 1e-5)
        if norm == "linf":
            assert extent(changed(query, start.rows))[0] == min(value, 10)
        assert side.draw(value, 2).shape == (2, 3, 10, 16)


@NORMS
def test_rows_drawn_again_are_those_that_count(norm: Norm) -> None:
    of = task(grey((3, 12, 12)), norm, epsilon=EPSILON[norm])
    search = Square().search(of)
    box = Script([1.0, 0.5])
    start = next(search)
    assert start.redraw is not None
    again = start.redraw([0])
    assert not again.equal(start.rows)
    query = search.send(box(again))
    assert query.redraw is not None
    second = query.redraw([0])
    assert not second.equal(query.rows)
    far = (second - again).abs().gt(1e-5).sum()
    assert far < (query.rows - start.rows).abs().gt(1e-5).sum()  # drawn around what was asked
    third = search.send(box(second))
    assert (third.rows - second).abs().gt(1e-5).sum() < (third.rows - start.rows).abs().gt(1e-5).sum()


@NORMS
def test_refused_rows_teach_nothing(norm: Norm) -> None:
    def rows(spoil: float) -> list[Tensor]:
        box = Script([1.0, 0.9, 0.1, 0.8], {0, 2, 5}, spoil)
        asked(task(grey((1, 9, 9)), norm, epsilon=EPSILON[norm], budget=30), box)
        return box.asked

    one, other = rows(math.nan), rows(-50.0)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert len(one) == 30
    assert not one[0].equal(one[1])  # the refused start is drawn again


@NORMS
def test_stochastic_answers_are_compared_in_pairs(norm: Norm) -> None:
    of = task(grey((3, 12, 12)), norm, epsilon=EPSILON[norm], budget=8, stochastic=True)
    #             start | worse than the lucky start, which is no longer lucky | ...
    box = Script([-9.0, 0.5, 1.0, 0.7, 0.6, 0.4, 0.6])
    start, first, second, third = asked(of, box)
    assert [len(q.rows) for q in (start, first, second, third)] == [1, 2, 2, 2]
    assert first.rows[1].equal(start.rows[0])
    assert second.rows[1].equal(first.rows[0])
    assert third.rows[1].equal(first.rows[0])


# The threat model.


@NORMS
@pytest.mark.parametrize("levels", [None, 256, 32])
def test_every_row_is_in_the_ball_after_rounding_and_uses_it(norm: Norm, levels: int | None) -> None:
    steps = 255 if levels is None else levels - 1
    image = (grey((3, 14, 11)) * steps).round() / steps
    for epsilon in (EPSILON[norm], 1.7 * EPSILON[norm]):
        of = task(image, norm, epsilon=epsilon, budget=120, levels=levels)
        box = Script([1 - k / 500 for k in range(120)])
        asked(of, box)
        rows = torch.stack(box.asked)
        if levels:
            rows = (rows * steps).round() / steps
        far = distance(rows - image, norm)
        assert far.max() <= epsilon * (1 + 1e-5)
        least = math.floor(epsilon * steps + 1e-3) / steps if levels and norm == "linf" else 0.9 * epsilon
        assert far.median() >= (0.85 * least if levels == 32 else least) - 1e-5  # coarse levels jump


@NORMS
@pytest.mark.parametrize("kind", degenerate((3, 8, 8)))
def test_images_without_structure(norm: Norm, kind: str) -> None:
    image = degenerate((3, 8, 8))[kind]
    result = run_attack(flat_scores, image[None], [0], "square", norm, epsilon=EPSILON[norm], budget=60)
    assert result.errors == [None]
    assert result.queries.tolist() == [60]


@NORMS
@pytest.mark.parametrize("budget", [1, 7, 100])
def test_budgets_are_spent_to_the_row(norm: Norm, budget: int) -> None:
    slope = Slope((3, 8, 8), 5.0)
    result = run_attack(slope, slope.images(2), [0, 0], "square", norm, epsilon=EPSILON[norm], budget=budget)
    assert result.queries.tolist() == [budget] * 2
    assert slope.rows == 2 * (budget + 1)


def test_better_than_blind_stripes() -> None:
    slope = Slope((3, 8, 8), 0.5)
    setting: dict[str, Any] = {"norm": "linf", "epsilon": 1.5 * slope.optimum("linf"), "budget": 1000}
    ours = run_attack(slope, slope.images(6), [0] * 6, "square", **setting)
    blind = run_attack(slope, slope.images(6), [0] * 6, "random", knowledge="score", **setting)
    assert np.all(ours.success)
    assert not blind.success.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, r"^p must be above 0 and at most 1, got 0\.0$"),
        ({"p": 1.5}, "p must be above 0"),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"loss": "margins"}, "did you mean margin"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Square(**options)
