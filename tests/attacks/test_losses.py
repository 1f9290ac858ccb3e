"""The losses of score attacks: the same from logits and probabilities, and informative where probabilities are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbox.attacks.losses import Loss, check_loss, losses
from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, REJECTED, Answer

from .analytic import task


def scored(scores: Tensor) -> Answer:
    return Answer.of(scores.argmax(dim=1), scores)


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize("loss", ["probability", "margin"])
def test_losses_of_logits_are_those_of_their_probabilities(loss: Loss, target: int | None) -> None:
    logits = 5 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of = task(torch.zeros(1, 2, 2), "l0", label=1, target=target)
    from_logits, from_scores = losses(of, scored(logits), loss), losses(of, scored(logits.softmax(dim=1)), loss)
    assert torch.allclose(from_logits, from_scores)
    p = logits.softmax(dim=1)
    if loss == "probability":
        assert torch.allclose(from_scores, p[:, 1] if target is None else 1 - p[:, 2])
    else:
        assert (from_scores < 0).equal(of.reached(scored(logits)))


def test_the_margin_still_tells_rows_apart_where_the_probability_rounds_to_one() -> None:
    of = task(torch.zeros(1, 2, 2), "l0")
    saturated = torch.tensor([[40.0, 0.0, 1.0], [40.0, 0.0, 5.0]]).softmax(dim=1)
    assert losses(of, scored(saturated), "probability").unique().numel() == 1
    near, far = losses(of, scored(saturated), "margin").tolist()
    assert (near, far) == (pytest.approx(39, rel=1e-5), pytest.approx(35, rel=1e-5))


@pytest.mark.parametrize(("target", "expected"), [(None, [-0.5, -2.0]), (2, [3.0, 60.0])])
def test_cross_entropy_is_the_logarithm_and_targeted_never_flat(target: int | None, expected: list[float]) -> None:
    of = task(torch.zeros(1, 2, 2), "l0", target=target)
    logs = torch.tensor([[-0.5, -9.0, -3.0], [-2.0, -9.0, -60.0]])
    assert losses(of, scored(logs.exp()), "cross-entropy").tolist() == pytest.approx(expected, rel=1e-5)


def test_hidden_classes_of_a_top_k_answer_are_unlikely_not_impossible() -> None:
    of = task(torch.zeros(1, 2, 2), "l0", label=0, target=2)
    values = losses(of, scored(torch.tensor([[0.7, 0.2, 0.0], [0.6, 0.0, 0.3]])), "margin")
    assert values.isfinite().all()
    assert values[0] > values[1]


def test_a_row_that_was_not_answered_has_no_loss_and_does_not_change_the_others() -> None:
    of = task(torch.zeros(1, 2, 2), "l0")
    scores = torch.tensor([[0.7, 0.3], [torch.nan, -5.0], [0.6, 0.4]])
    answer = Answer(torch.tensor([0, -1, 0]), scores, torch.tensor([ANSWERED, REJECTED, ANSWERED], dtype=torch.uint8))
    assert losses(of, answer, "probability").tolist() == [pytest.approx(0.7), torch.inf, pytest.approx(0.6)]


def test_unknown_losses_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean margin"):
        check_loss("margins")
