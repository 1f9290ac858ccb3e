"""Randomized smoothing (Cohen, Rosenfeld, Kolter, ICML 2019): the class that most of n noisy copies of a row get.

g(x) = argmax_c P[f(x + δ) = c], δ ~ N(0, σ²I), estimated for every query by n fresh draws (PREDICT, algorithm 1): the class
with the most votes, or no answer where a two-sided binomial test between the two leading classes does not reject a tie at
level alpha. `python -m robustbox.certify` says within which radius the answer cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from robustbox.distances import rounded
from robustbox.errors import InputError
from robustbox.identity import sha256
from robustbox.protocol import ANSWERED, REJECTED, Answer, BlackBox, Defense

from .row_streams import RowStreams
from .transforms import Outer
from .unanswered import Unanswered


@dataclass(frozen=True, kw_only=True)
class Smoothing(Defense):
    """Randomized smoothing: each query is answered by a vote over noisy copies of it.

    Query cost: a query is one row to the client and n rows to the model behind.

    Args:
        sigma: standard deviation of the noise, in units of images in [0, 1].
        n: noisy copies that vote on a query.
        alpha: abstain (the row is refused, and charged) where the vote could be a tie at this level; null: always answer.
        clip: clip the noisy copies to [0, 1], for a model that takes nothing else.
        batch: noisy copies a pass of the model.

    Raises:
        InputError: a number that means nothing.
    """

    name: ClassVar[str] = "smoothing"

    sigma: float = 0.25
    n: int = 100
    alpha: float | None = 0.001
    clip: bool = False
    batch: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise InputError(f"sigma of smoothing must be a positive number, not {self.sigma}")
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise InputError(f"alpha of smoothing must lie between 0 and 1, or be null; not {self.alpha}")
        if min(self.n, self.batch) < 1:
            raise InputError("n and batch of smoothing must be at least 1")

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The smoothed black box; stochastic, whatever `box` is."""
        return SmoothedBox(box, self, seed)


@dataclass(slots=True)
class Poll:
    """The vote on a row: what the noise of its copies begins with, and the answers to copies so far, part by part."""

    seed: int
    labels: list[Tensor] = field(default_factory=list)
    status: list[Tensor] = field(default_factory=list)


class SmoothedBox(Outer):
    """A black box behind `Smoothing`: its scores are shares of the votes.

    Each row's copies come from a stream of its own (`row_streams`). Copies that a defense behind refuses have no vote.

    Where the model fails, the votes that were cast stand, and the streams of rows that got no answer are those of their
    accounts' next rows: of a row that is sent again only the copies without an answer are asked, the same as before, so that
    a gate behind sees each copy once.
    """

    def __init__(self, inner: BlackBox, smoothing: Smoothing, seed: int) -> None:
        super().__init__(inner, smoothing)
        self.stochastic = True
        self.scores = None if inner.classes is None else "probability"
        self._smoothing = smoothing
        self._streams = RowStreams(inner.device, "fresh", seed, smoothing.name)
        self._unanswered = Unanswered[tuple[str, Poll]]()

    @torch.no_grad()
    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1], each by a vote; an abstention is REJECTED, with label -1 and scores NaN."""
        ballots, answered = self._ballots(rows, accounts)
        k = self.classes or int(ballots.max()) + 1
        votes = one_hot(ballots.clamp_min(0), k).mul_(answered[..., None]).sum(dim=1)
        leading = votes.topk(min(2, k), dim=1)
        labels = leading.indices[:, 0]
        silent = votes.sum(dim=1) == 0
        if self._smoothing.alpha is not None:
            first, second = leading.values[:, 0], leading.values[:, -1] if k > 1 else torch.zeros_like(labels)
            silent |= tie(first, second) > self._smoothing.alpha
        shares = votes / votes.sum(dim=1, keepdim=True).clamp_min(1)
        self.scores = "none" if self.classes is None else "probability"
        scores = shares.masked_fill(silent[:, None], torch.nan) if self.classes is not None else None
        status = torch.where(silent, REJECTED, ANSWERED).to(torch.uint8)
        return Answer(labels.masked_fill(silent, -1), scores, status)

    def _ballots(self, rows: Tensor, accounts: Tensor) -> tuple[Tensor, Tensor]:
        """The labels that n noisy copies of each row get, int64 [rows, n], and which of them were answered."""
        senders = accounts.tolist()
        polls = [self._poll(rows[k : k + 1], accounts[k : k + 1]) for k in range(len(rows))]
        try:
            for row, account, poll in zip(rows, senders, polls, strict=True):
                self._cast(row, account, poll)
        except BaseException:
            self._unanswered.keep(senders, [(sha256(row), poll) for row, poll in zip(rows, polls, strict=True)])
            raise
        shape = (len(rows), self._smoothing.n)
        labels = torch.cat([part for poll in polls for part in poll.labels])
        status = torch.cat([part for poll in polls for part in poll.status])
        return labels.view(shape), status.view(shape) == ANSWERED

    def _poll(self, row: Tensor, account: Tensor) -> Poll:
        """The vote on a row [1,C,H,W] of an account [1]: a new one, or that which a failure of the model broke off."""
        kept = self._unanswered.take(int(account))
        if kept is None:
            return Poll(self._streams.seeds(row, account)[0])
        known, poll = kept
        return poll if known == sha256(row[0]) else Poll(poll.seed)

    def _cast(self, row: Tensor, account: int, poll: Poll) -> None:
        """Ask the noisy copies of a row [C,H,W] that have not voted yet."""
        chosen = self._smoothing
        noise = self._streams.begin([poll.seed])[0]
        copies = row.new_empty(chosen.n, *row.shape).normal_(std=chosen.sigma, generator=noise).add_(row)
        if chosen.clip or self.levels is not None:
            copies.clamp_(0, 1)
        if self.levels is not None:  # rows travel on a grid: rounding is a part of what is smoothed
            copies = rounded(copies, self.levels)
        for part in copies.split(chosen.batch)[len(poll.labels) :]:
            answer = self._inner_answer(part, torch.full((len(part),), account))
            poll.labels.append(answer.labels)
            poll.status.append(answer.status)


def tie(first: Tensor, second: Tensor) -> Tensor:
    """The p-value of the two-sided binomial test that two classes with so many votes, first >= second, are equally likely.

    P = min(1, 2 P[Bin(first + second, 1/2) >= first]), which is 2 I_{1/2}(first, second + 1) with the regularised incomplete
    beta function; 1 where nobody voted.
    """
    from scipy.special import betainc

    a, b = first.cpu().double().numpy(), second.cpu().double().numpy()
    p = 2 * betainc(a.clip(min=1), b + 1, 0.5)
    return torch.from_numpy(p).clamp_max(1).masked_fill((first == 0).cpu(), 1).to(first.device)
