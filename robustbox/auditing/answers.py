"""What answers tell of a black box: whether it answers at random, and how far its scores are rounded."""

from __future__ import annotations

from torch import Tensor

from robustbox.protocol import ANSWERED, Answer

_TELLING = 8
"""Scores that are neither 0 nor 1 which it takes to tell that all are rounded."""


def differ(first: Answer, second: Answer) -> bool:
    """Whether rows that were answered twice were answered differently, beyond rounding."""
    both = (first.status == ANSWERED) & (second.status == ANSWERED)
    if bool((first.labels != second.labels)[both].any()):
        return True
    if first.scores is None or second.scores is None:
        return False
    there = both.to(first.scores.device)
    one, two = first.scores[there], second.scores[there]
    return bool(((one - two).abs() > 1e-4 * (1 + one.abs())).any())


def decimals(scores: Tensor) -> int | None:
    """To how many decimals (1 to 5) scores are rounded; None where they are not, or where too few could tell."""
    values = scores.detach().double().cpu().flatten()
    for k in range(1, 6):
        scaled = values * 10**k
        telling = (scaled.abs() > 0.5) & ((values - 1).abs() * 10**k > 0.5)
        if int(telling.sum()) >= _TELLING and bool(
            ((scaled - scaled.round()).abs() < 1e-2 * 10 ** (k - 5) + 1e-5).all()
        ):
            return k
    return None
