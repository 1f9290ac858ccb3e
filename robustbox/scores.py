"""What models return: scores or labels; probabilities or logits, by what they look like; one output, which is two classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbox.errors import ModelError
from robustbox.protocol import Scores

_TOLERANCE = 1e-3
"""By how much the sum of probabilities may be off however precise they are: services round theirs."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def read(returned: Any, n: int, device: torch.device, name: str) -> Tensor:
    """What a model returned for n rows, as a tensor of its own: float scores [n,K], or integer labels [n].

    Args:
        returned: a tensor, an array or lists, or an object that holds one of them as `logits`. One float a row may also stand
            as [n], or as [] where n is 1, and becomes [n,1].
        n: rows that it was asked.
        device: where the tensor shall be.
        name: of the model.

    Raises:
        ModelError: it returned anything else.
    """
    returned = getattr(returned, "logits", returned)
    what = type(returned).__name__
    try:
        output = torch.as_tensor(returned if isinstance(returned, Tensor) else np.asarray(returned))
        output = output.to(device, copy=True)  # a model may write its next answer where this one stands
    except (TypeError, ValueError):
        output = None
    if output is not None:
        what = f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
        if output.is_floating_point() and output.ndim == 2 and output.shape[1] > 1:
            return output
        if output.is_floating_point() and output.ndim <= 2 and output.numel() == n:
            return output.reshape(n, 1)
        if output.dtype in _INTEGERS and output.ndim == 1:
            return output
    raise ModelError(
        f"{name} returned {what} for {n} rows: it must return float scores [n,K], one column a class "
        "(a yes-or-no model: two, or one), or integer labels [n]"
    )


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


def interpreted(scores: Tensor, known: Scores | None, name: str, declare: str) -> tuple[Tensor, Scores | None]:
    """Scores [n,K] as a black box answers them, K >= 2, and what they are; None while nothing but NaN was answered.

    Args:
        scores: what the model gave: [n,K], or [n,1] of a model that says yes or no.
        known: what they are, where it was declared or an answer before has shown it.
        name: of the model.
        declare: how its user says what its scores are.

    Raises:
        ModelError: as `recognise` and `two_classes`.
    """
    kind = known or recognise(scores, name, declare)
    return two_classes(scores, kind, name, declare) if scores.shape[1] == 1 else scores, kind


def recognise(scores: Tensor, name: str, declare: str) -> Scores | None:
    """Whether scores [n,K] are probabilities or logits: probabilities lie in [0, 1], and sum to 1 where K > 1.

    Logits of one output (K = 1) that happen to lie in [0, 1] pass for probabilities: the fewer rows, the likelier. Rows of NaN
    show nothing.

    Raises:
        ModelError: one output, and nothing but whole numbers: these may as well be labels.
    """
    scores = scores[~scores.isnan().any(dim=1)]
    if not len(scores):
        return None
    inside = ((scores >= 0) & (scores <= 1)).all()
    if scores.shape[1] > 1:
        return "probability" if bool(inside & ((total(scores) - 1).abs() <= tolerance(scores)).all()) else "logit"
    if torch.equal(scores, scores.round()):
        raise ModelError(
            f"{name} returned one float a row, and whole numbers only: labels must be integers, and scores that begin "
            f"like this must be declared ({declare})"
        )
    return "probability" if bool(inside) else "logit"


def two_classes(values: Tensor, kind: Scores | None, name: str, declare: str) -> Tensor:
    """Scores [n,2] from those of class 1, [n,1]: a probability p becomes [1 - p, p], a logit z [-z/2, z/2]. NaN stays.

    So the label is 1 where p > 0.5 or z > 0, and 0 in a tie. Softmax makes of [0, z] what it makes of [-z/2, z/2], but attacks,
    who know probabilities by their signs and sums, would take it for such where z is in [0, 1].

    Raises:
        ModelError: a probability outside [0, 1].
    """
    if kind == "logit":
        return torch.cat((-values / 2, values / 2), dim=1)
    if bool((outside := (values < 0) | (values > 1)).any()):
        raise ModelError(
            f"{name} returned {float(values[outside][0]):g}, and what it returned first looked like probabilities, or was "
            f"declared so: if these are logits, declare that ({declare})"
        )
    return torch.cat((1 - values, values), dim=1)
