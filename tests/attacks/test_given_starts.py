"""Rows to begin from that the attacker brings along: asked first, charged once, and no loss where they are of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbox import list_attacks, registry, run_attack
from robustbox.attacks.race import LATE, TURN
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, Norm
from tests.attacks.analytic import Flat
from tests.attacks.table import AWAY, MODES, SHAPE, Mode, Plane, images

BEGINS = [
    mode
    for mode in MODES
    if registry.load("attacks", mode.attack).takes_start and (mode.attack != "nes" or mode.options)
]
CLEAN = 1
"""Rows of the clean check of one image."""
begins = pytest.mark.parametrize("mode", BEGINS, ids=str)


def near(n: int = 1, by: float = 1.1) -> Tensor:
    """Rows [n,3,8,8] straight beyond the plane, `by` times as far from the image as the plane is."""
    return (images(n) + by * AWAY * Flat(SHAPE, AWAY).normal).clamp(0, 1)


def attacked(mode: Mode, budget: int, n: int = 1, **more: Any) -> tuple[Any, Plane]:
    box = Plane()
    result = run_attack(box, images(n), [0] * n, budget=budget, **mode.setting(), **more)
    assert not any(result.errors), result.errors
    assert len(box.rows) == sum(result.ledger.values())
    return result, box


@begins
def test_a_start_that_reaches_the_goal_is_the_first_row_and_the_first_success(mode: Mode) -> None:
    result, box = attacked(mode, 80, starts=near())
    assert torch.equal(box.rows[CLEAN], near()[0])
    query, far = result.traces[0][0]
    assert query == 1
    if mode.norm == "l2":
        assert far == pytest.approx(1.1 * AWAY, rel=1e-5)
    assert result.queries[0] <= 80
    assert result.meta["starts"] == 1


@pytest.mark.parametrize("mode", [mode for mode in BEGINS if mode.epsilon is None], ids=str)
def test_a_search_goes_on_from_a_start_that_is_near(mode: Mode) -> None:
    """After 40 rows it is at the boundary before the start, where 60 rows do not lead without one."""
    result, _ = attacked(mode, 40, starts=near())
    if mode.norm == "l2":
        assert result.distance_at(40)[0] <= 1.03 * AWAY
    assert result.distance_at(40)[0] < 0.95 * result.distance_at(1)[0]
    without, _ = attacked(mode, 60)
    assert result.distance_at(40)[0] < 0.9 * without.distance_at(60)[0]


@begins
def test_a_start_that_fails_costs_one_row_and_changes_nothing_else(mode: Mode) -> None:
    useless = near(by=0.9)
    before, without = attacked(mode, 50)
    after, given = attacked(mode, 51, starts=useless)
    asked = before.queries[0]
    assert asked >= 15  # an image that falls within epsilon ends there
    assert after.queries[0] == asked + 1
    assert torch.equal(given.rows[CLEAN], useless[0])
    assert torch.equal(given.rows[CLEAN + 1 :][:asked], without.rows[CLEAN:][:asked])
    assert after.meta["starts"] == 1


@begins
def test_rows_of_nan_are_no_starts(mode: Mode) -> None:
    starts = torch.cat([torch.full((1, *SHAPE), torch.nan), near(2)[1:]])
    alone, _ = attacked(mode, 60)
    both, _ = attacked(mode, 60, n=2, starts=starts)
    assert both.traces[0] == alone.traces[0]
    assert both.traces[1][0][0] == 1
    assert both.meta["starts"] == 1


@pytest.mark.parametrize("name", sorted({*list_attacks()} - {mode.attack for mode in BEGINS}))
def test_other_attacks_refuse_starts_before_a_query(name: str) -> None:
    (mode, *_) = [mode for mode in MODES if mode.attack == name]
    box = Plane()
    with pytest.raises(InputError, match=r"begins? at the image itself"):
        run_attack(box, images(1), [0], budget=10, starts=near(), **mode.setting())
    assert not box.seen


def test_nes_takes_starts_only_where_it_begins_from_one() -> None:
    box = Plane()
    nothing, one = torch.full((1, *SHAPE), torch.nan), near(2)[1:]
    with pytest.raises(InputError, match="top or copies"):  # the second image has one, the first has none
        run_attack(box, images(2), [0, 0], "nes", epsilon=1.0, budget=10, starts=torch.cat([nothing, one]))
    assert not box.seen


def test_starts_of_another_size_are_refused_where_the_model_tells_none() -> None:
    box = Plane()
    with pytest.raises(InputError, match="starts are 1 x 8 x 8, the attacked images 3 x 8 x 8"):
        run_attack(box, images(2), [0, 0], budget=10, starts=near(2)[:, :1])
    assert not box.seen


@pytest.mark.parametrize(
    ("starts", "complaint"),
    [
        (near(2)[:1], "starts must be 2 rows"),
        (near(2)[0], "starts must be 2 rows"),
        (near(2)[:, :1], "starts are 1 x 8 x 8, the model takes 3 x 8 x 8"),
        (near(2) + 1, "starts must lie in"),
        (torch.where(torch.arange(8) < 4, near(2), torch.nan), "starts must lie in .* has NaN"),
        ((255 * near(2)).long(), "starts must be floats"),
    ],
)
def test_bad_starts_are_refused_before_a_query(starts: Tensor, complaint: str) -> None:
    box = Plane()
    box.input_shape = SHAPE
    with pytest.raises(InputError, match=complaint):
        run_attack(box, images(2), [0, 0], budget=10, starts=starts)
    assert not box.seen


def test_a_start_travels_as_the_threat_model_transmits_it() -> None:
    result, box = attacked(Mode("cgba"), 30, starts=near(), levels=256)
    grid = box.rows[CLEAN] * 255
    assert torch.allclose(grid, (near()[0] * 255).round(), atol=1e-3)
    assert result.traces[0][0][0] == 1


def test_an_earlier_run_is_gone_on_with() -> None:
    """The adversarials of a run are starts of the next one, which ends nearer than both."""
    first, _ = attacked(Mode("waterfill"), 150, n=3)
    second, _ = attacked(Mode("cgba"), 150, n=3, starts=first.adversarials)
    assert (second.distance <= first.distance).all()
    assert [trace[0][0] for trace in second.traces] == [1, 1, 1]
    assert second.meta["starts"] == 3


def test_starts_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    """A stopped run goes on with the same starts alone."""
    setting: dict[str, Any] = {"attack": "cgba", "budget": 40, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        run_attack(Interrupted(20), images(2), [0, 0], starts=near(2), **setting)
    with pytest.raises(InputError, match="another run"):
        run_attack(Plane(), images(2), [0, 0], starts=near(2, by=1.2), **setting)
    with pytest.raises(InputError, match="another run"):
        run_attack(Plane(), images(2), [0, 0], **setting)
    result = run_attack(Plane(), images(2), [0, 0], starts=near(2), **setting)
    whole = run_attack(Plane(), images(2), [0, 0], starts=near(2), attack="cgba", budget=40)
    assert result.traces == whole.traces


class Interrupted(Plane):
    """A plane whose user gives up after so many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.left = rows

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.left -= len(rows)
        if self.left < 0:
            raise KeyboardInterrupt
        return super().answer(rows, accounts)


def test_wrapped_attacks_and_foolbox_begin_from_them_too() -> None:
    for name in ("oars:hop-skip-jump", "abort:boundary", "foolbox:HopSkipJumpAttack", "foolbox:BoundaryAttack"):
        result, box = attacked(Mode(name), 60, starts=near())
        assert torch.equal(box.rows[CLEAN], near()[0]), name
        assert result.traces[0][0][0] == 1, name
    with pytest.raises(InputError, match="begins at the image itself"):
        run_attack(Plane(), images(1), [0], "foolbox:L2AdditiveGaussianNoiseAttack", epsilon=1.0, starts=near())


# Waterfill


@pytest.mark.parametrize(("norm", "rivals"), [("l2", 1), ("linf", 2)])
def test_waterfill_goes_on_from_a_start_that_its_rivals_do_not_come_near(norm: Norm, rivals: int) -> None:
    """It is asked and shortened by turns with the climb (and RayS), which are given up after LATE rows each at most."""
    box = Asked()
    result = run_attack(box, images(1), [0], "waterfill", norm, budget=300, starts=near())
    far = distance(box.rows[CLEAN : CLEAN + 300] - images(1), norm)
    asked = far[:TURN]
    assert (asked <= asked[0]).all()  # the start, and the line to the image
    assert far[TURN] < 0.5 * asked[0]  # the first wavelet
    found = result.distance_at(2 * TURN + rivals * TURN)[0]
    assert found <= 1.06 * asked[0] / 1.1
    assert (far[2 * TURN + rivals * LATE : 80] < 2 * found).all()
    assert result.distance_at(300)[0] < found


def test_waterfill_gives_up_a_start_that_is_further_than_its_climb() -> None:
    """Class 1 are fine waves, and what is dark, far from the image: a start there gives way to the waves."""

    def label(rows: Tensor) -> Tensor:
        fine = torch.fft.rfft2(rows.sum(1))[:, 2:7, 2:].abs().amax((1, 2))
        return ((rows.flatten(1).mean(1) < 0.05) | (fine > 12)).long()

    grey = torch.full((1, *SHAPE), 0.5)
    for norm in ("l2", "linf"):
        result = run_attack(label, grey, [0], "waterfill", norm, budget=100, starts=torch.zeros(1, *SHAPE))
        usual = run_attack(label, grey, [0], "waterfill", norm, budget=100)
        assert result.traces[0][0][0] == 1
        assert result.distance_at(100)[0] <= 1.5 * usual.distance_at(100)[0] < 0.5 * result.distance_at(1)[0]


class Asked(Plane):
    """A plane that keeps its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[int] = []

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = super().answer(rows, accounts)
        assert (answer.status == ANSWERED).all()
        self.labels += answer.labels.tolist()
        return answer
