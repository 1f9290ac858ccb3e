"""What must hold for every attack in every mode: counts, limits, independence, odd images, and the optimum of a plane."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import list_attacks, registry, run_attack
from robustbox.distances import distance
from robustbox.protocol import REJECTED, Answer
from robustbox.records import inside
from tests.attacks.table import MODES, SHAPE, Mode, Plane, images, optimum

every = pytest.mark.parametrize("mode", MODES, ids=str)


class RefusesOne(Plane):
    """A plane that refuses one row of the attack, by its number from 1; the clean check's rows are not counted."""

    def __init__(self, number: int, clean: int) -> None:
        super().__init__()
        self.refused, self.garbage = number + clean, 0.0

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        before = sum(map(len, self.seen))
        answer = super().answer(rows, accounts)
        if before < self.refused <= before + len(rows):
            i = self.refused - before - 1
            answer.labels[i], answer.status[i] = -1, REJECTED
            assert answer.scores is not None
            answer.scores[i] = self.garbage
        return answer


def test_every_attack_stands_in_the_table() -> None:
    assert {mode.attack for mode in MODES} == set(list_attacks())


def test_every_claim_of_an_attack_stands_in_the_table() -> None:
    for name in list_attacks():
        attack = registry.load("attacks", name)
        assert {mode.norm for mode in MODES if mode.attack == name} == set(attack.norms), name


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_scores_may_be_of_any_precision(mode: Mode, dtype: torch.dtype) -> None:
    class Precise(Plane):
        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            answer = super().answer(rows, accounts)
            assert answer.scores is not None
            return Answer.of(answer.labels, answer.scores.to(dtype))

    result = run_attack(Precise(), images(2), [0] * 2, budget=60, knowledge="score", **mode.setting())
    assert not any(result.errors), result.errors
    if dtype == torch.float64:
        plain = run_attack(Plane(), images(2), [0] * 2, budget=60, knowledge="score", **mode.setting())
        assert result.success.tolist() == plain.success.tolist()


@every
@pytest.mark.parametrize("budget", [1, 7, 100, 1000])
def test_counts_are_exact(mode: Mode, budget: int) -> None:
    n = 1 if budget == 1000 else 2
    if mode.attack == "bayes-subspace":
        budget = min(budget, 300)  # a Gaussian process of 1000 points takes a minute
    box = Plane()
    result = run_attack(box, images(n), [0] * n, budget=budget, **mode.setting())
    assert not any(result.errors), result.errors
    assert len(box.rows) == sum(result.ledger.values())
    assert result.ledger.get("attack", 0) + result.ledger.get("calibrate", 0) == result.queries.sum()
    for spent, reason in zip(result.queries, result.stop_reasons, strict=True):
        assert spent == budget if reason == "budget" else spent <= budget and reason in ("success", "finished")


@every
def test_every_row_lies_where_the_threat_model_allows(mode: Mode) -> None:
    """Rows outside the box are errors; the ball holds for what the model sees, after rounding to 8 bits."""
    box = Plane(frozen=True)
    clean = (images(1) * 255).round() / 255
    result = run_attack(box, clean, [0], budget=300, levels=256, **mode.setting())
    assert not any(result.errors), result.errors
    grid = box.rows * 255
    assert (grid - grid.round()).abs().max() < 1e-3
    if mode.restricted:
        far = distance(box.rows - clean, mode.norm)
        assert inside(float(far.max()), mode.radius)
        assert far.max() > 0


@every
def test_company_changes_nothing(mode: Mode) -> None:
    def rows(of: Tensor, **setting: Any) -> tuple[list[Any], Tensor]:
        box = Plane()
        result = run_attack(box, of, [0] * len(of), budget=150, **mode.setting(), **setting)
        return result.traces, box.rows

    traces, _ = rows(images(3), max_rows=5)
    alone, asked = rows(images(3)[1:2])
    again, same = rows(images(3)[1:2])
    assert traces[1] == alone[0] == again[0]
    assert (asked == same).all()


@every
@pytest.mark.parametrize("frozen", [False, True])
def test_odd_images_end_without_an_error(mode: Mode, frozen: bool) -> None:
    """Black, grey and white images, one that is misclassified; and a model that never changes its answer."""
    flat = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, *SHAPE)
    checkers = (torch.arange(64).view(8, 8) % 2).float().expand(1, *SHAPE)
    box = Plane(frozen)
    setting = mode.setting() | ({"targets": [1, 1, 1, 0]} if mode.targeted else {})
    result = run_attack(box, torch.cat([flat, checkers]), [0, 0, 0, 1], budget=120, **setting)
    assert not any(result.errors), result.errors
    assert torch.isfinite(box.rows).all()
    if frozen:
        assert not result.success.any()
        assert result.clean_correct.tolist() == [True, True, True, False]


@every
@pytest.mark.parametrize("number", [3, 57])
def test_one_refused_row_says_nothing_and_ends_nothing(mode: Mode, number: int) -> None:
    budget = 150 if mode.attack == "bayes-subspace" else 600  # a Gaussian process of 600 points takes minutes

    def traces(garbage: float) -> tuple[list[list[tuple[int, float]]], list[str]]:
        box = RefusesOne(number, clean=1)
        box.garbage = garbage
        result = run_attack(box, images(1), [0], budget=budget, max_rows=1, **mode.setting())
        assert not any(result.errors), result.errors
        assert result.rejected.sum() == (result.queries >= number).sum()
        return result.traces, result.stop_reasons

    found, reasons = traces(0.0)
    assert (found, reasons) == traces(torch.nan)
    if mode.factors and mode.factors[1] < 2:  # else it stands near its best by then
        assert found[0][-1][0] > 57  # it went on to improve


MINIMAL = [mode for mode in MODES if mode.factors]
FIXED = [mode for mode in MODES if mode.budget]


@pytest.mark.parametrize("mode", MINIMAL, ids=str)
def test_comes_near_to_the_optimum_of_a_plane(mode: Mode) -> None:
    assert mode.factors is not None
    result = run_attack(Plane(), images(4), [0] * 4, budget=5000, **mode.setting())
    assert not any(result.errors), result.errors
    for queries, factor in zip((1000, 5000), mode.factors, strict=True):
        assert np.median(result.distance_at(queries)) <= factor * optimum(mode.norm)


def test_what_signs_reach_is_what_the_table_says() -> None:
    normal = Plane().normal
    signs = (normal.numel() ** 0.5) / float(normal.abs().sum())
    assert [mode.own for mode in MODES if mode.own != 1] == [pytest.approx(signs, abs=0.002)]


@pytest.mark.parametrize("mode", FIXED, ids=str)
def test_succeeds_a_quarter_beyond_the_optimum(mode: Mode) -> None:
    assert mode.budget is not None
    assert mode.epsilon is not None
    assert mode.epsilon <= 1.25 * mode.own
    result = run_attack(Plane(), images(4), [0] * 4, budget=mode.budget, **mode.setting())
    assert not any(result.errors), result.errors
    assert result.success.all()
