"""The largest noise at a stated drop in accuracy: held to closed forms, to held-out images, and to the ledger."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustbox as rb
from robustbox import registry
from robustbox.attack import main as attack
from robustbox.boxes import CallableBox, ModuleBox, as_black_box
from robustbox.defend import main as defend
from robustbox.defense_file import read_defense, read_record
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.layers import find
from robustbox.defenses.logit_noise import LogitNoise
from robustbox.defenses.noise_scale import calibrate, gradient_norm, right
from robustbox.defenses.noise_trainers import InputNoiseTrainer, LogitNoiseTrainer, RandomFeaturesTrainer
from robustbox.defenses.random_features import RandomFeatures
from robustbox.errors import InputError
from robustbox.oracle import Oracle
from robustbox.trainer import Workshop


class Two(nn.Module):
    """Two classes at margin w x + b over two hidden places, of which the second is ten times as large; counts rows."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.small, self.large, self.w, self.rows = nn.Flatten(), nn.Identity(), w, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        m: Tensor = self.large(10 * self.small(x)) @ self.w / 10
        return torch.stack((-m, m), dim=1)


class One(Two):
    """The same with one output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.tensor([-1.0, 1.0])


def planted(n: int, margin: float) -> tuple[Two, Tensor, Tensor]:
    """n rows of class 1, all at one margin."""
    model = Two(torch.ones(12))
    return model, torch.full((n, 3, 2, 2), margin / 12), torch.ones(n, dtype=torch.long)


def test_the_scale_is_that_of_the_closed_form() -> None:
    """P(wrong) = Phi(-m / (nu sqrt(12))): its upper bound at the scale found is just below the target."""
    model, x, y = planted(2000, 0.5)
    oracle = Oracle(ModuleBox(model))
    found = calibrate(lambda nu: RandomFeatures(nu, "small", "abs"), oracle, x, y, 0.02, draws=3, steps=10)
    wrong = 0.5 * math.erfc(0.5 / (found.nu * math.sqrt(12)) / math.sqrt(2))
    assert found.low < wrong < found.high
    assert 0.012 < wrong < 0.02
    assert found.bound <= 0.02
    assert found.bound > 0.015
    assert (found.accuracy, found.images, found.draws) == (1.0, 2000, 3)
    assert model.rows == oracle.ledger["calibrate"] == sum(oracle.ledger.values())
    assert model.rows <= 2000 * (1 + 3 * 12)


def test_the_same_seed_finds_the_same_and_noise_is_common_to_all_scales() -> None:
    model, x, y = planted(400, 0.5)
    oracle = Oracle(ModuleBox(model))

    def once(seed: int) -> float:
        return calibrate(
            lambda nu: RandomFeatures(nu, "small", "abs"), oracle, x, y, 0.05, draws=1, steps=8, seed=seed
        ).nu

    assert once(0) == once(0)
    assert once(0) != once(1)
    box = ModuleBox(model)
    wrong = [
        ~right(oracle, RandomFeatures(nu, "small", "abs").wrap(box, 0), x, y.numpy(), 0, 32) for nu in (0.1, 0.2, 0.3)
    ]
    assert not (wrong[0] & ~wrong[1]).any()  # who is wrong under a little noise is wrong under more of the same
    assert not (wrong[1] & ~wrong[2]).any()


def test_the_ends_of_the_range() -> None:
    model, x, y = planted(100, 0.5)
    oracle = Oracle(ModuleBox(model))
    assert calibrate(lambda nu: RandomFeatures(nu, "small", "abs"), oracle, x, y, 0.1, between=(1e-4, 1e-3)).nu == 1e-3
    with pytest.raises(InputError, match="already costs more"):
        calibrate(lambda nu: RandomFeatures(nu, "small", "abs"), oracle, x, y, 0.02, between=(5.0, 9.0))


def test_the_gradient_is_that_of_the_margin() -> None:
    """L = 2 (w x): ||dL/dh|| = 2 ||w|| at the small place, a tenth of it at the large one."""
    model, x, y = planted(40, 0.5)
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    box = ModuleBox(model)
    small, large = (gradient_norm(box, [at], x, y, "abs") for at in ("small", "large"))
    assert small == pytest.approx(2 * math.sqrt(12), rel=1e-5)
    assert large == pytest.approx(small / 10, rel=1e-5)
    relative = [gradient_norm(box, [at], x, y) for at in ("small", "large")]
    assert relative[0] == pytest.approx(relative[1], rel=1e-4)
    spread = x.flatten(1).std(dim=1, correction=0).mean()
    assert relative[0] == pytest.approx(small * float(spread), rel=1e-3)
    both = gradient_norm(box, ["small", "large"], x, y, "abs")
    assert both == pytest.approx(math.hypot(small, large), rel=1e-5)


def shop(n: int = 400) -> tuple[Workshop, Tensor, Tensor]:
    """The digits network with n training images, and 360 test images that it never saw."""
    train, held = rb.load_data("digits:train"), rb.load_data("digits")
    oracle = Oracle(as_black_box("digits-cnn"), "score")
    return Workshop(oracle, train[0][:n], train[1][:n].tolist()), held[0], held[1]


@pytest.mark.parametrize(
    "trainer",
    [
        RandomFeaturesTrainer(drop=0.05, draws=2, steps=6, at="stage:1"),
        InputNoiseTrainer(drop=0.05, draws=2, steps=6),
        LogitNoiseTrainer(drop=0.05, draws=2, steps=6),
    ],
)
def test_the_drop_holds_on_images_that_were_held_out(trainer: Any) -> None:
    work, images, labels = shop()
    defense = trainer.train(work)
    box = defense.wrap(work.box, 7)
    oracle = Oracle(work.box)
    clean = right(oracle, work.box, images, labels.numpy(), 0, 64)
    noisy = [right(oracle, box, images, labels.numpy(), 1000 * draw, 64) for draw in range(1, 4)]
    drop = clean.mean() - sum(hits.mean() for hits in noisy) / 3
    assert 0.005 < drop < 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(images))
    kept: Any = work.record["calibration"]
    assert kept["bound"] <= kept["target"] == 0.05
    assert kept["low"] <= kept["drop"] <= kept["high"]
    assert set(work.oracle.ledger) == {"calibrate"}


def test_the_place_that_does_most_is_chosen() -> None:
    work, _, _ = shop(200)
    trainer = RandomFeaturesTrainer(drop=0.1, draws=1, steps=4, candidates=["features.1", "stage:*", "penultimate"])
    defense = trainer.train(work)
    kept: Any = work.record["calibration"]
    table = kept["candidates"]
    assert list(table) == ["post:features.1", "post:features.4", "pre:head.3"]
    assert isinstance(defense, RandomFeatures)
    assert defense.places == [kept["at"]] == [max(table, key=lambda place: table[place]["reach"])]
    assert defense.nu == kept["nu"] == table[kept["at"]]["nu"]
    for place, scale in table.items():
        assert isinstance(work.box, ModuleBox)
        assert find(work.box.module, [place])[0].name == place
        assert scale["reach"] == pytest.approx(scale["nu"] * scale["gradient"])


def test_from_the_command_line_to_an_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "noise.safetensors"
    options = "random-features --model digits-cnn --data digits:train --images 100 --drop 0.1 --draws 1 --steps 3"
    assert defend([*options.split(), "--at", "stage:1", "--out", str(path)]) == 0
    assert "costs" in capsys.readouterr().out
    defense = read_defense(path)
    assert isinstance(defense, RandomFeatures)
    record = read_record(path)
    assert record["calibration"]["nu"] == defense.nu
    assert set(record["ledger"]) == {"calibrate"}
    run = f"--model digits-cnn --attack square --norm linf --epsilon 0.2 --images 2 --budget 20 --defense {path}"
    assert attack([*run.split(), "--out", str(tmp_path / "run")]) == 0
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert document["defense"][0]["name"] == "random-features"
    assert document["defense"][0]["options"]["nu"] == defense.nu


def test_what_cannot_be_calibrated() -> None:
    images, labels = torch.rand(60, 1, 8, 8), [0] * 60
    blind = Workshop(Oracle(CallableBox(lambda x: x.flatten(1)[:, :10])), images, labels)
    with pytest.raises(InputError, match="needs a torch module"):
        RandomFeaturesTrainer().train(blind)
    few, _, _ = shop(20)
    with pytest.raises(InputError, match="50 images or more"):
        InputNoiseTrainer().train(few)
    with pytest.raises(InputError, match="drop"):
        InputNoiseTrainer(drop=0)
    with pytest.raises(InputError, match="draws of input-noise must be a whole number"):
        InputNoiseTrainer(draws=1.5)  # type: ignore[arg-type]
    labels_only = CallableBox(lambda x: pytest.fail("a row was asked"), scores="none")
    with pytest.raises(InputError, match="labels only"):
        LogitNoiseTrainer().train(Workshop(Oracle(labels_only), images, labels))
    assert not few.oracle.ledger


def test_they_are_registered() -> None:
    for trainer in (RandomFeaturesTrainer, InputNoiseTrainer, LogitNoiseTrainer):
        assert registry.load("trainers", trainer.name) is trainer
    assert {InputNoise.name, LogitNoise.name, RandomFeatures.name} <= set(registry.names("defenses"))


def test_the_gradient_of_one_output_is_that_of_two() -> None:
    model, x, y = planted(40, 0.5)
    two = gradient_norm(ModuleBox(model), ["small"], x, y, "abs")
    one = ModuleBox(One(model.w), scores="logit")
    assert gradient_norm(one, ["small"], x, y, "abs") == pytest.approx(two, rel=1e-5)
