"""Random features and the baselines in whole runs: what they are worth, what they cost, and that nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustbox as rb
from robustbox.defenses.bit_depth import BitDepth
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.logit_noise import LogitNoise
from robustbox.defenses.median import Median
from robustbox.defenses.random_features import RandomFeatures
from robustbox.errors import ModelError
from robustbox.protocol import Defense
from robustbox.results import AttackResult

TWO_PERCENT = RandomFeatures(nu=0.6)
"""As found by `python -m robustbox.defend random-features --model digits-cnn --data digits:train --at stage:-1 --drop 0.02`."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network = rb.load_model("digits-cnn")
    assert isinstance(network, nn.Module)
    return network


@pytest.fixture
def rows(model: nn.Module) -> Iterator[list[int]]:
    """How many rows each pass of the model took."""
    seen: list[int] = []
    handle = model.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    yield seen
    handle.remove()


def fight(model: nn.Module, defense: Defense | list[Defense] | None, n: int = 12, **setting: object) -> AttackResult:
    """Square on digits, within 0.2 in linf."""
    images, labels = (part[:n] for part in rb.load_data("digits")[:2])
    threat = {"attack": "square", "norm": "linf", "epsilon": 0.2, "budget": 300, "max_rows": 64, **setting}
    return rb.run_attack(model, images, labels, defense=defense, **threat)  # type: ignore[arg-type]


def robust(result: AttackResult) -> int:
    return int((result.clean_correct & ~result.success_fresh).sum())


def test_it_is_worth_more_than_ten_points_and_eot_takes_some_of_them_back(model: nn.Module) -> None:
    """By the `fresh` rate, at 2 % drop, over three seeds; EOT-10 has ten times the rows, and so as many queries of its own."""
    fooled = {"bare": 0, "noise": 0, "eot": 0}
    for seed in range(3):
        bare, noise = (fight(model, defense, seed=seed) for defense in (None, TWO_PERCENT))
        often = fight(model, TWO_PERCENT, seed=seed, eot=10, budget=3000)
        assert noise.clean_correct.sum() >= bare.clean_correct.sum() - 1
        assert robust(noise) >= robust(bare) + 2  # of 12: more than ten points
        assert (noise.success_fresh <= noise.success_any).all()
        for name, result in (("bare", bare), ("noise", noise), ("eot", often)):
            fooled[name] += int(result.success_fresh.sum())
    assert fooled["noise"] + 3 <= fooled["eot"] <= fooled["bare"]


@pytest.mark.parametrize(
    "null", [RandomFeatures(nu=0.0, at=["stem", "stage:*"]), LogitNoise(0.0), Median(1), [BitDepth(8), Median(1)]]
)
def test_a_defense_that_does_nothing_changes_no_number(
    model: nn.Module, null: Defense | list[Defense], rows: list[int]
) -> None:
    bare = fight(model, None, n=6, levels=256)
    before = sum(rows)
    result = fight(model, null, n=6, levels=256)
    assert result.traces == bare.traces
    assert torch.equal(result.adversarials.nan_to_num(), bare.adversarials.nan_to_num())
    assert result.queries.tolist() == bare.queries.tolist()
    assert result.success.tolist() == bare.success.tolist()
    assert result.ledger["attack"] == bare.ledger["attack"]
    assert sum(rows) - before == sum(result.ledger.values())


def test_every_row_that_the_network_sees_stands_in_a_ledger(model: nn.Module, rows: list[int]) -> None:
    for defense in (TWO_PERCENT, [LogitNoise(0.5), BitDepth(4), TWO_PERCENT], [InputNoise(0.05)]):
        rows.clear()
        result = fight(model, defense, n=5, budget=60)  # type: ignore[arg-type]
        assert sum(rows) == sum(result.ledger.values())
        asked = int((result.fresh_draws > 0).sum())
        mixed = isinstance(defense, list) and len(defense) == 3
        assert result.ledger["verify"] == 5 * 25 + asked * (25 + 1 + mixed)


def test_an_image_alone_among_others_and_in_passes_of_any_size_has_one_result(model: nn.Module) -> None:
    """Answered row by row: no rounding depends on the batch."""

    class RowByRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.model(row[None]) for row in x])

    class Hidden(RandomFeatures):
        """The noise goes into the whole answer, which is one tensor for all rows."""

    noise = Hidden(nu=0.3, at="logits")
    images, labels = (part[:5] for part in rb.load_data("digits")[:2])
    found = []
    for few, fused in ((slice(2, 3), 64), (slice(0, 5), 64), (slice(0, 5), 1)):
        result = rb.run_attack(
            RowByRow(), images[few], labels[few], "square", "linf", 0.2, budget=60, defense=noise, max_rows=fused
        )
        found.append(result.traces[2 % len(labels[few])])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("defense", [TWO_PERCENT, [LogitNoise(0.5), Median(2), TWO_PERCENT]])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    model: nn.Module, defense: Defense | list[Defense], tmp_path: Path
) -> None:
    class Failing(nn.Module):
        def __init__(self, passes: int) -> None:
            super().__init__()
            self.model, self.passes = model, passes

        def forward(self, x: Tensor) -> Tensor:
            self.passes -= 1
            if not self.passes:
                raise RuntimeError("the power went")
            answer: Tensor = self.model(x)
            return answer

    setting: dict[str, Any] = {"n": 5, "budget": 60}
    whole = fight(Failing(-1), defense, **setting)
    with pytest.raises(ModelError, match="the power went"):
        fight(Failing(15), defense, out=tmp_path / "run", **setting)
    resumed = Failing(-1)
    result = fight(resumed, defense, out=tmp_path / "run", **setting)
    assert result.traces == whole.traces
    assert result.fresh_fooled.tolist() == whole.fresh_fooled.tolist()
    assert result.success_clean.tolist() == whole.success_clean.tolist()
    assert result.ledger == whole.ledger


def test_seeds(model: nn.Module) -> None:
    first, again, other = (fight(model, TWO_PERCENT, n=6, budget=80, seed=seed) for seed in (0, 0, 1))
    assert first.traces == again.traces
    assert first.fresh_fooled.tolist() == again.fresh_fooled.tolist()
    assert first.traces != other.traces


def test_hashed_noise_gives_replays_nothing_new_and_is_judged_as_it_answers(model: nn.Module) -> None:
    hashed = RandomFeatures(nu=0.6, mode="hash")
    once, often = fight(model, hashed, n=8, budget=100), fight(model, hashed, n=8, budget=300, eot=3)
    assert not once.meta["stochastic"]
    assert (once.success == once.success_any).all()
    assert [[(3 * query, far) for query, far in trace] for trace in once.traces] == often.traces
    assert np.isin(once.fresh_draws, (0, 1)).all()
