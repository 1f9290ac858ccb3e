"""Logit noise: every query is answered with noisy scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, BlackBox, Defense

from .row_streams import RowStreams, unit_noise
from .transforms import Outer, wide


@dataclass(frozen=True)
class LogitNoise(Defense):
    """Noise on the output, the baseline of Nguyen et al. 2024 and of Chen et al. 2022: z <- z + sigma v, v ~ N(0, I).

    The label is that of the noisy scores. Where the black box behind it answers probabilities, the noise goes onto their
    logarithms, and the answer is probabilities again.

    Args:
        sigma: standard deviation of the noise on each logit.

    Query cost: one row of the model behind it for each row.

    Raises:
        InputError: sigma is negative or not finite; a black box that answers labels only.
    """

    name: ClassVar[str] = "logit-noise"

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise InputError(f"sigma of logit-noise must be a finite number of at least 0, not {self.sigma}")

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind noisy scores; stochastic unless sigma is 0."""
        return NoisyScores(box, self, seed)


class NoisyScores(Outer):
    """A black box behind `LogitNoise`; each row's noise comes from a stream of its own (`row_streams`)."""

    def __init__(self, inner: BlackBox, noise: LogitNoise, seed: int) -> None:
        super().__init__(inner, noise)
        self._sigma = noise.sigma
        self.stochastic = inner.stochastic or noise.sigma > 0
        self._streams = RowStreams(inner.device, "fresh", seed, noise.name)
        self._needs_scores()

    def answer(self, rows: torch.Tensor, accounts: torch.Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1] with noisy scores and the labels that follow from them."""
        answer = self._inner_answer(rows, accounts)
        if answer.scores is None or not self._sigma:
            self._needs_scores()
            return answer
        noise = unit_noise(self._streams.open(rows, accounts), answer.scores.shape[1], self.device)
        z = wide(answer.scores)
        z = z.log() if self.scores == "probability" else z
        z = z + self._sigma * noise.to(z.dtype)
        labels = torch.where((answer.status == ANSWERED).to(z.device), z.argmax(dim=1), answer.labels.to(z.device))
        return Answer(labels, z.softmax(dim=1) if self.scores == "probability" else z, answer.status)
