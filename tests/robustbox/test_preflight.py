"""The pre-flight: each flag is raised by the black box that deserves it, by no other, and every row is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbox.auditing.answers import decimals
from robustbox.auditing.flags import CODES, flag
from robustbox.auditing.preflight import Subject, look
from robustbox.auditing.spec import PreflightEntry
from robustbox.boxes import CallableBox
from robustbox.protocol import REJECTED, Answer, BlackBox

ENTRY = PreflightEntry(images=16, copies=9, benign=20)
COLOURS = torch.rand(36, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
COLOURS[torch.arange(36), torch.arange(36) % 3] += 0.6
LABELS = torch.arange(36) % 3  # the strongest channel


def scores(rows: Tensor) -> Tensor:
    """Probabilities of the three channels."""
    return (rows.mean(dim=(2, 3)) * 5).softmax(dim=1)


class Watch(BlackBox):
    """Answers by a function and counts."""

    name, classes = "watch", 3

    def __init__(self, function: Callable[[Tensor], Tensor], stochastic: bool = False) -> None:
        self.box, self.rows, self.stochastic = CallableBox(function), 0, stochastic

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.rows += len(rows)
        answer = self.box.answer(rows, accounts)
        self.scores = self.box.scores
        return answer


class Twins(BlackBox):
    """Refuses a row of an account that asked one within 0.1 (linf) before, and every row whose corner is dark."""

    stateful, name, classes = True, "twins", 3

    def __init__(self, inner: BlackBox) -> None:
        self.inner = inner
        self.seen: dict[int, list[Tensor]] = {}

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = self.inner.answer(rows, accounts) if self.inner else None
        assert answer is not None
        self.scores = self.inner.scores if self.inner else None
        for k, (row, account) in enumerate(zip(rows, accounts.tolist(), strict=True)):
            history = self.seen.setdefault(account, [])
            if any(float((row - old).abs().max()) < 0.1 for old in history):
                answer.labels[k], answer.status[k] = -1, REJECTED
            history.append(row)
        return answer


def report(box: BlackBox, build: Callable[[], BlackBox] | None = None) -> dict[str, Any]:
    return look(Subject(build or (lambda: box), box, COLOURS[:16], LABELS[:16], COLOURS[16:], None, 0), ENTRY)


def codes(found: dict[str, Any]) -> list[str]:
    return [each["code"] for each in found["flags"]]


def noisy(rows: Tensor) -> Tensor:
    return (rows.mean(dim=(2, 3)) * 5 + 0.1 * torch.randn(len(rows), 3)).softmax(dim=1)


def test_a_sound_model_raises_nothing_and_costs_what_is_said() -> None:
    box = Watch(scores)
    found = report(box)
    assert codes(found) == []
    assert found["rows"] == {"verify": 4 * 16 + 10} == {"verify": box.rows}
    assert (found["scores"], found["decimals"], found["stochastic"], found["stateful"]) == (
        "probability",
        None,
        False,
        False,
    )
    assert (found["clean"]["hits"], found["forwards_per_row"]) == (16, 1.0)
    assert "answer" not in vars(box) or box.answer.__name__ == "answer"  # nothing of the count is left behind


@pytest.mark.parametrize(
    ("function", "declared", "expected"),
    [
        (noisy, True, ["stochastic"]),
        (noisy, False, ["stochastic", "undeclared-noise"]),
        (scores, True, ["stochastic"]),
        (lambda rows: (scores(rows) * 100).round() / 100, False, ["rounded-scores"]),
        (lambda rows: scores(rows).argmax(dim=1), False, ["label-only"]),
        (lambda rows: scores(rows) * torch.nan, False, ["fails"]),
        (lambda rows: torch.eye(3)[:1].expand(len(rows), -1), False, ["chance"]),
        (lambda rows: scores(rows.flip(1)), False, ["chance", "box"]),
        (
            lambda rows: ((rows / 255).mean(dim=(2, 3)) * 5 + torch.tensor([0.1, 0, 0])).softmax(dim=1),
            False,
            ["chance", "box"],
        ),
    ],
)
def test_each_flag_is_raised_by_who_deserves_it(
    function: Callable[[Tensor], Tensor], declared: bool, expected: list[str]
) -> None:
    box = Watch(function, declared)
    found = report(box)
    assert codes(found) == expected
    assert found["rows"]["verify"] == box.rows


def test_the_box_is_named_that_would_fit() -> None:
    found = report(Watch(lambda rows: scores(rows.flip(1))))
    assert "if images are BGR" in found["flags"][1]["seen"]


def test_rounding_is_told_by_its_decimals() -> None:
    values = torch.rand(20, 5, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    for k in (1, 2, 3, 4, 5):
        assert decimals((values * 10**k).round() / 10**k) == k
    assert decimals(values) is None
    assert decimals(torch.eye(5)) is None  # a sure model rounds nothing


def test_a_gate_is_seen_through_near_copies_and_natural_images() -> None:
    inner = Watch(scores)
    found = look(
        Subject(lambda: Twins(inner), inner, COLOURS[:16], LABELS[:16], COLOURS[[16, 17, 18, 16, 19]], None, 0), ENTRY
    )
    assert codes(found) == ["refuses-near-duplicates", "refuses-benign"]
    assert found["copies"] == {"sent": 10, "refused": 9, "first_refused": 2}
    assert (found["benign"]["refused"], found["benign"]["of"]) == (1, 5)
    assert found["benign"]["high"] == pytest.approx(0.716, abs=1e-3)  # Clopper and Pearson's for 1 of 5
    assert found["rows"]["verify"] == 4 * 16 + 10 + 5 == inner.rows


def test_every_flag_has_its_three_parts() -> None:
    for code in CODES:
        raised = flag(code)
        assert all((raised.raised_if, raised.meaning, raised.what_to_do)), code
