"""What scores are, by what they look like: probabilities or logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustbox.protocol import Scores

_TOLERANCE = 1e-3
"""By how much the sum of probabilities may be off however precise they are: services round theirs."""


def tolerance(scores: Tensor) -> float:
    """By how much the sum of the K probabilities of a row of [n,K] may differ from 1, as far as their precision goes.

    Each is off by half a unit in its last place (or by half the least number that there is, where it is too small for one), and
    so is, on each of log2 K levels, the sum by which they were divided. That is 0.012 for 2 classes and 0.047 for 1000 in
    bfloat16, 0.0015 and 0.0059 in float16; in float32 and float64, as everywhere at least, it is 0.001.

    What was rounded to fewer bits before (bfloat16 that was turned into float32) does not show it, and must be declared.
    """
    k, numbers = scores.shape[1], torch.finfo(scores.dtype)
    rounding = numbers.eps / 2 * (2 + math.log2(k)) + k * numbers.smallest_normal * numbers.eps / 2
    return max(_TOLERANCE, rounding)


def total(scores: Tensor) -> Tensor:
    """The sum of each row of [n,K], in float32 at least: [n]."""
    return scores.sum(dim=1, dtype=torch.promote_types(scores.dtype, torch.float32))


def maybe_truncated(scores: Tensor) -> Tensor:
    """Which rows of [n,K] may be probabilities, whole or with 0 in place of hidden ones: bool [n]."""
    return (scores >= 0).all(dim=1) & (total(scores) <= 1 + tolerance(scores))


def recognise(scores: Tensor) -> Scores:
    """Whether scores [n,K] are probabilities or logits, by what they look like."""
    inside = (scores >= 0) & (scores <= 1)
    whole = (total(scores) - 1).abs() <= tolerance(scores)
    return "probability" if bool(inside.all() & whole.all()) else "logit"
