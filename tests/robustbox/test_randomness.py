"""What success means where a black box answers at random: any, fresh, clean, strict, undefended, and the risk of replays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.api import worst_case
from robustbox.attack import main
from robustbox.protocol import Answer, BlackBox, Defense, Query, Search, Task
from tests.toys import HalfSpace, Scripted, images


class Wrapped(BlackBox):
    """Passes on what is known of the black box behind it."""

    def __init__(self, inner: BlackBox) -> None:
        self.inner: BlackBox = inner
        self.name, self.classes, self.scores = inner.name, inner.classes, inner.scores
        self.stochastic, self.stateful = inner.stochastic, inner.stateful

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return self.inner.answer(rows, accounts)


@dataclass(frozen=True)
class Luck(Defense):
    """Gives every row brighter than `above` the other label in just so many of 25 successive answers to it."""

    times: int
    above: float = 0.0
    name: ClassVar[str] = "luck"

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        return Lucky(box, self)


class Lucky(Wrapped):
    def __init__(self, inner: BlackBox, luck: Luck) -> None:
        super().__init__(inner)
        self.luck, self.stochastic, self.asked = luck, True, dict[bytes, int]()

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        answer = super().answer(rows, accounts)
        for i, row in enumerate(rows):
            if row.mean() > self.luck.above:
                key = row.numpy().tobytes()
                self.asked[key] = self.asked.get(key, -1) + 1
                if self.asked[key] % 25 < self.luck.times:
                    answer.labels[i] = 1 - answer.labels[i]
        return answer


@dataclass(frozen=True)
class Lighter(Defense):
    """Brightens every row; deterministic."""

    by: float
    name: ClassVar[str] = "lighter"

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        outer = self

        class Box(Wrapped):
            def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
                return super().answer((rows + outer.by).clamp(0, 1), accounts)

        return Box(box)


def bright(far: float) -> Scripted:
    """Asks 25 times for the image brightened: for images around 0.4, adversarial from 0.2 on."""

    def script(task: Task) -> Search:
        yield Query((task.image + far).clamp(0, 1).expand(25, -1, -1, -1))

    return Scripted(script)


@pytest.mark.parametrize(
    ("far", "times", "light", "rates"),
    [
        (0.3, 0, 0.0, "any fresh clean strict undefended"),  # adversarial, and the noise does nothing
        (0.3, 10, 0.0, "any fresh clean strict undefended"),  # adversarial, veiled
        (0.3, 20, 0.0, "any clean undefended"),  # adversarial but for the noise
        (0.1, 20, 0.0, "any fresh"),  # the noise alone
        (0.1, 10, 0.0, "any"),  # luck
        (0.1, 0, 0.0, ""),
        (0.17, 0, 0.05, "any fresh clean strict"),  # adversarial to the rest of the pipeline, not to the model
        (0.17, 20, 0.05, "any clean"),
        (0.3, 20, 0.05, "any clean undefended"),
    ],
)
def test_each_rate_means_what_it_says(far: float, times: int, light: float, rates: str) -> None:
    box = HalfSpace()
    chain: list[Defense] = [Luck(times, above=0.5 if far > 0.1 else 0.45), *([Lighter(light)] if light else [])]
    result = run_attack(box, images(4), [0] * 4, bright(far), budget=25, defense=chain)
    found = {
        "any": result.success_any,
        "fresh": result.success_fresh,
        "clean": result.success_clean,
        "strict": result.success_strict,
        "undefended": result.success_undefended,
    }
    assert {name: flags.tolist() for name, flags in found.items()} == {
        name: [name in rates.split()] * 4 for name in found
    }
    assert (result.success == result.success_fresh).all()
    assert not (result.success_fresh & ~result.success_any).any()
    summary = result.summary()
    assert summary["noise_only"] == int((result.success_fresh & ~result.success_clean).sum())
    asked = 4 if result.first_success.any() else 0
    assert result.ledger["verify"] == 4 * 25 + asked * (25 + 1 + bool(light))
    assert box.rows == sum(result.ledger.values())


@pytest.mark.parametrize("times", [0, 1, 5, 25])
def test_the_risk_of_replays(times: int) -> None:
    result = run_attack(HalfSpace(), images(3), [0] * 3, bright(0.1), budget=25, defense=Luck(times, above=0.45))
    p = times / 25
    assert (result.fresh_draws == (25 if times else 0)).all()
    assert (result.fresh_fooled == times).all()
    for n in (1, 10, 100):
        assert result.replay_risk(n) == pytest.approx(1 - (1 - p) ** n)
    assert result.summary()["replay_risk"] == pytest.approx({"10": 1 - (1 - p) ** 10, "100": 1 - (1 - p) ** 100})


def test_without_noise_all_rates_are_one_and_cost_nothing() -> None:
    box = HalfSpace()
    result = run_attack(box, images(4), [0] * 4, bright(0.17), budget=5, defense=Lighter(0.05))
    assert result.success_fresh.all()
    assert result.success_clean.all()
    assert result.success_strict.all()
    assert not result.success_undefended.any()
    assert result.ledger["verify"] == 4 + 4 + 4
    assert result.replay_risk(10).tolist() == [1.0] * 4


def test_noise_of_the_model_itself_cannot_be_taken_off() -> None:
    half = HalfSpace()

    class Model(Lucky):
        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            self.inner = half
            answer = super().answer(rows, accounts)
            self.inner = None
            return answer

    model = Model(half, Luck(20, above=0.45))
    model.inner = None
    result = run_attack(model, images(2), [0, 0], bright(0.1), budget=25)
    assert result.success_fresh.all()
    assert result.success_clean.all()
    assert result.ledger["verify"] == 2 * 25 + 2 * 25


def test_an_attack_that_returns_the_clean_image_scores_nothing_but_the_misclassified_are_apart() -> None:
    x = torch.cat([images(3), images(2, mean=0.9)])
    result = run_attack(HalfSpace(), x, [0] * 5, bright(0.0), budget=25, defense=Luck(10, above=0.0))
    assert result.clean_correct.tolist() == [True] * 3 + [False] * 2
    assert not result.success.any()
    assert result.summary()["success"]["of"] == 3


def test_the_worst_case_counts_every_question() -> None:
    chain = [Luck(0), Lighter(0.05)]
    rows = worst_case(HalfSpace(), images(4), [0] * 4, attack=bright(0.17), budget=25, defense=chain)
    result = run_attack(HalfSpace(), images(4), [0] * 4, bright(0.17), budget=25, defense=chain)
    assert rows["verify"] == result.ledger["verify"] == 4 * (25 + 25 + 1 + 1)


def test_the_command_line_shows_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--model digits-cnn --attack square --norm linf --epsilon 0.3 --images 3 --budget 60 --defense input-noise"
    )
    assert main([*options.split(), "--defense.sigma", "0.1", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    for line in ("success on any query", "success on fresh draws", "noise off", "success both ways", "replay risk"):
        assert line in shown
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {f"success_{name}" for name in ("any", "fresh", "clean", "strict", "undefended")} <= set(document["summary"])
    for image in document["images"]:
        draws = image["fresh"]
        assert draws["of"] in (0, 25)
        risk = 0.0 if not draws["of"] else 1 - (1 - draws["share"]) ** 10
        assert np.isclose(image["replay_risk"]["10"], risk)
        assert draws["low"] <= (draws["share"] or 0) <= draws["high"]
