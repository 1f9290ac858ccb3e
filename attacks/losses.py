"""What score attacks minimise: one number a row, low where the goal is near.

All losses take probabilities, whole or truncated to the top K (hidden classes hold 0), as well as logits: scores are read
as probabilities where no row of the query is negative anywhere or sums to more than 1.

    probability     p_label (untargeted) or 1 - p_target: what most papers minimise; flat once p_label rounds to 1
    cross-entropy   log p_label (untargeted) or -log p_target: untargeted flat as well, targeted never
    margin          log p_label - max log p_other, or max log p_other - log p_target: negative where the goal is reached,
                    and informative also where p_label rounds to 1, since float32 keeps small probabilities exactly
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from robustbox.errors import unknown_name
from robustbox.protocol import ANSWERED, Answer, Task
from robustbox.scores import maybe_truncated

Loss = Literal["probability", "cross-entropy", "margin"]


def check_loss(loss: str) -> None:
    """Refuse a loss that does not exist.

    Raises:
        InputError: with the names that do.
    """
    if loss not in get_args(Loss):
        raise unknown_name("loss", loss, get_args(Loss))


def losses(task: Task, answer: Answer, loss: Loss) -> Tensor:
    """The loss of each row of an answer that has scores: float [n] on their device; inf where a row was not answered."""
    assert answer.scores is not None  # the engine grants them to an attack that needs them
    scores = answer.scores
    unknown = (
        (answer.status != ANSWERED).to(scores.device) if answer.status.any() else None
    )  # the status is on the host
    told = scores if unknown is None else scores.masked_fill(unknown[:, None], 0)
    probable = maybe_truncated(told).all()
    log = torch.where(probable, told.clamp_min(torch.finfo(told.dtype).tiny).log(), told.log_softmax(dim=1))
    wanted = task.label if task.target is None else task.target
    value = log[:, wanted]
    if loss == "probability":
        value = value.exp() if task.target is None else 1 - value.exp()
    elif loss == "cross-entropy":
        value = value if task.target is None else -value
    else:
        others = log.clone()
        others[:, wanted] = -torch.inf
        rivals = others.amax(dim=1)
        value = value - rivals if task.target is None else rivals - value
    return value if unknown is None else value.masked_fill(unknown, torch.inf)
