"""What scores are, whatever their precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import run_attack
from robustbox.attacks.losses import losses
from robustbox.boxes import CallableBox
from robustbox.protocol import Answer
from robustbox.scores import maybe_truncated, recognise, tolerance
from tests.attacks.analytic import task
from tests.toys import NeedsScores, images

HALVES = [torch.bfloat16, torch.float16]


def logits(classes: int, dtype: torch.dtype, spread: float = 3.0) -> Tensor:
    """Logits [n,K]."""
    n = 64 if classes < 10_000 else 8
    return (torch.randn(n, classes, generator=torch.Generator().manual_seed(0)) * spread).to(dtype)


def by_hand(z: Tensor) -> Tensor:
    """Probabilities as models compute them that have no softmax, each step rounded."""
    e = (z - z.amax(dim=1, keepdim=True)).exp()
    return e / e.sum(dim=1, keepdim=True)


def kind(scores: Tensor) -> Any:
    return recognise(scores)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000, 21841])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_probabilities_of_any_precision_are_probabilities(dtype: torch.dtype, classes: int) -> None:
    for spread in (0.01, 1.0, 5.0, 20.0):
        for made in (torch.softmax(logits(classes, dtype, spread), 1), by_hand(logits(classes, dtype, spread))):
            assert kind(made) == "probability"
            assert maybe_truncated(made).all()


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_what_sums_to_more_or_less_than_precision_explains_are_logits(dtype: torch.dtype, classes: int) -> None:
    p = logits(classes, torch.float64, 1.0).softmax(dim=1) * 0.8
    for off in (-1.5, 1.5):
        scores = p.clone()
        scores[:, 0] += 0.2 + off * tolerance(p.to(dtype))
        assert kind(scores.to(dtype)) == "logit"
    assert kind(logits(classes, dtype)) == "logit"


def test_single_precision_may_be_off_by_what_it_could_before() -> None:
    for dtype in (torch.float32, torch.float64):
        assert {tolerance(torch.zeros(1, k, dtype=dtype)) for k in (2, 10, 1000, 21841)} == {1e-3}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_score_attack_is_told_the_probabilities_that_the_model_gave(dtype: torch.dtype) -> None:
    box = CallableBox(lambda rows: by_hand(20 * (rows.flatten(1)[:, :30] - 0.4).to(dtype)))
    rows = images(40)
    labels = box.answer(rows, torch.zeros(40)).labels
    saw = NeedsScores()
    run_attack(box, rows, labels, saw, budget=1, knowledge="score")
    assert box.scores == "probability"
    found = torch.cat([part for part in saw.saw if part is not None])
    assert torch.equal(found, box.function(rows))


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_read_them_as_probabilities(dtype: torch.dtype) -> None:
    of = task(torch.zeros(1, 2, 2), "l0", label=1)
    p = torch.cat([by_hand(logits(10, dtype, spread)) for spread in (0.5, 2.0)])
    got = losses(of, Answer.of(p.argmax(dim=1), p), "probability")
    np.testing.assert_allclose(got.float(), p[:, 1].float(), rtol=0.03, atol=1e-3)
