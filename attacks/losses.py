"""What score attacks minimise: one number a row, low where the goal is near.

Both losses take probabilities, whole or truncated to the top K (hidden classes hold 0), as well as logits: scores are read
as probabilities where no row of the query is negative anywhere or sums to more than 1.

    probability   p_label (untargeted) or 1 - p_target: what most papers minimise; flat once p_label rounds to 1
    margin        log p_label - max log p_other, or max log p_other - log p_target: negative where the goal is reached,
                  and informative also where p_label rounds to 1, since float32 keeps small probabilities exactly
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from robustbox.errors import unknown_name
from robustbox.protocol import ANSWERED, Answer, Task

Loss = Literal["probability", "margin"]


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
    scores, unknown = answer.scores, (answer.status != ANSWERED).to(answer.scores.device)
    tiny = torch.finfo(scores.dtype).tiny
    probable = ((scores >= 0).all(dim=1) & (scores.sum(dim=1) <= 1 + 1e-3) | unknown).all()
    log = torch.where(probable, scores.clamp(min=tiny).log(), scores.log_softmax(dim=1))
    wanted = task.label if task.target is None else task.target
    if loss == "probability":
        value = log[:, wanted].exp() if task.target is None else 1 - log[:, wanted].exp()
    else:
        rivals = log.index_fill(1, torch.tensor(wanted, device=log.device), -torch.inf).amax(dim=1)
        value = log[:, wanted] - rivals if task.target is None else rivals - log[:, wanted]
    return value.masked_fill(unknown, torch.inf)
