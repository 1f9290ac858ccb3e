"""AAA: scores whose margin misleads a score attack, by post-processing alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, BlackBox, Defense

from .transforms import Outer, wide


@dataclass(frozen=True)
class AAA(Defense):
    """Chen et al. 2022, "Adversarial Attack on Attackers: Post-Process to Mitigate Black-Box Score-Based Query Attacks".

    The linear form. The axis of margins m = z_y - max_{k != y} z_k (y the predicted class) is cut into intervals of length
    tau, and within each the margin is mirrored: a step that lowers it is answered with a higher one,

        m* = a - alpha (m - a),    a = (floor(m / tau) + 1/2) tau.

    For each row, kappa steps of Adam on u from u = z minimise |m(u) - m*| + beta |p_y(u) - p_y(z / T)|. Labels stay, and
    confidences stay calibrated. Deterministic. Against attacks that see labels only it does nothing.

    Deviations: rows are optimised each by itself (the authors' loss is the mean over a batch), y stays the class of the
    margin throughout, and u_y is lifted above all others should the steps have ended below.

    Args:
        interval: tau, the attractor interval.
        reverse: alpha, the reverse step.
        calibration: beta, the weight of the confidence.
        steps: kappa, steps of Adam.
        rate: its learning rate.
        temperature: T, tuned on held-out images by the authors; 1 keeps the model's own confidence.

    Query cost: one row of the model behind it for each row.

    Raises:
        InputError: a number that means nothing; a black box that answers labels only.
    """

    name: ClassVar[str] = "aaa"

    interval: float = 6.0
    reverse: float = 1.0
    calibration: float = 5.0
    steps: int = 100
    rate: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        positive = (self.interval, self.rate, self.temperature)
        if not all(math.isfinite(value) and value > 0 for value in positive):
            raise InputError("interval, rate and temperature of aaa must be finite numbers above 0")
        if not (0 <= self.reverse <= 1 and self.calibration >= 0 and self.steps >= 1):
            raise InputError("aaa takes reverse from 0 to 1, calibration of at least 0 and steps of at least 1")

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind misleading scores."""
        return Misleading(box, self)


class Misleading(Outer):
    """A black box behind `AAA`."""

    def __init__(self, inner: BlackBox, aaa: AAA) -> None:
        super().__init__(inner, aaa)
        self._aaa = aaa
        self._needs_scores()

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1] with the labels of the black box behind and scores that mislead."""
        answer = self._inner_answer(rows, accounts)
        if answer.scores is None:
            self._needs_scores()
            return answer
        here = (answer.status == ANSWERED).to(self.device)
        scores = wide(answer.scores).clone()
        z = scores[here]
        probabilities = self.scores == "probability"
        u = self._mislead(z.log().clamp_min(-80) if probabilities else z)
        scores[here] = u.softmax(dim=1) if probabilities else u
        return Answer(answer.labels, scores, answer.status)

    def _mislead(self, z: Tensor) -> Tensor:
        """Logits [n,K] -> logits [n,K]."""
        aaa = self._aaa
        y = z.argmax(dim=1, keepdim=True)
        m = margin(z, y)
        a = (torch.floor(m / aaa.interval) + 0.5) * aaa.interval
        target = a - aaa.reverse * (m - a)
        confidence = (z / aaa.temperature).softmax(dim=1).gather(1, y)[:, 0]
        with torch.enable_grad():
            u = z.detach().clone().requires_grad_()
            adam = torch.optim.Adam([u], lr=aaa.rate)
            for _ in range(aaa.steps):
                p = F.softmax(u, dim=1).gather(1, y)[:, 0]
                loss = (margin(u, y) - target).abs() + aaa.calibration * (p - confidence).abs()
                (u.grad,) = torch.autograd.grad(loss.sum(), u)
                adam.step()
        found = u.detach()
        others = found.scatter(1, y, -torch.inf).amax(dim=1, keepdim=True)
        least = torch.nextafter(others, torch.full_like(others, torch.inf))
        return found.scatter(1, y, torch.maximum(found.gather(1, y), least))


def margin(z: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{k != y} z_k for logits [n,K] and classes [n,1]: [n]."""
    return z.gather(1, y)[:, 0] - z.scatter(1, y, -torch.inf).amax(dim=1)
