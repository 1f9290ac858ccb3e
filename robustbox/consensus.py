"""Several answers to one row taken as one: expectation over the black box's randomness (EOT, Athalye et al. 2018)."""

from __future__ import annotations

import torch

from robustbox.protocol import ANSWERED, Answer


def consensus(answer: Answer, copies: int) -> Answer:
    """One answer for every `copies` successive ones: [n copies] -> [n].

    The label is the one given most often (of several: the lowest class), scores are means; both over the copies that were
    answered. Where none was, the status is that of the first copy.
    """
    if copies == 1:
        return answer
    labels, status = answer.labels.view(-1, copies), answer.status.view(-1, copies)
    answered = status == ANSWERED
    votes = torch.zeros(len(labels), int(labels.max().clamp_min(0)) + 1, dtype=torch.long)
    votes.scatter_add_(1, labels.clamp_min(0), answered.long())
    some = answered.any(dim=1)
    verdict = torch.where(some, votes.argmax(dim=1), -1)
    scores = None
    if answer.scores is not None:
        weights = answered.to(answer.scores.device, answer.scores.dtype)[..., None]
        kept = answer.scores.view(*labels.shape, -1).masked_fill(weights == 0, 0)
        scores = kept.sum(dim=1) / weights.sum(dim=1).clamp_min(1)
    return Answer(verdict, scores, torch.where(some, torch.zeros_like(status[:, 0]), status[:, 0]))
