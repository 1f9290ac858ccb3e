"""CERTIFY: the l2 radius within which a smoothed classifier provably answers the same (Cohen, Rosenfeld, Kolter, ICML 2019).

The smoothed classifier answers the class that the base classifier f, any black box with its defenses, gives most often under
noise: g(x) = argmax_c P[f(x + δ) = c], δ ~ N(0, σ²I). If the likeliest class has a probability of at least p > 1/2, g is
constant within R = σ Φ⁻¹(p) (theorem 1). CERTIFY (algorithm 1) guesses that class from n0 draws, and bounds p from below
by n fresh ones, one-sided Clopper-Pearson at 1 - alpha; where the bound is not above 1/2 it abstains. So a certificate is
wrong with a probability of at most alpha an image.

The noise is not clipped: a base classifier that takes only images in [0, 1] is to be certified with `clip`, which makes the
clipping a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.evaluator import clerk
from robustbox.identity import sha256, stream
from robustbox.inputs import check_count
from robustbox.oracle import Oracle
from robustbox.protocol import ANSWERED

ABSTAINED = -1
"""What is predicted where the draws do not tell."""


def lower_bound(hits: int, n: int, alpha: float) -> float:
    """The one-sided Clopper-Pearson bound: a probability below which k of n hits have a chance of at most alpha."""
    if hits == 0:
        return 0.0
    from scipy.special import betaincinv

    return float(betaincinv(hits, n - hits + 1, alpha))


def radius(hits: int, n: int, sigma: float, alpha: float) -> float:
    """The certified l2 radius for `hits` of n draws that gave the class, in units of the images; 0: abstain."""
    from scipy.special import ndtri

    bound = lower_bound(hits, n, alpha)
    return sigma * float(ndtri(bound)) if bound > 0.5 else 0.0


class Certificate(NamedTuple):
    """What is certified of one image: the class (-1: abstained), the l2 radius, and how many of n draws gave the class."""

    predicted: int
    radius: float
    hits: int


@dataclass(frozen=True, slots=True)
class Certifier:
    """CERTIFY with its numbers.

    Args:
        sigma: standard deviation of the noise, in units of images in [0, 1].
        n0: draws that guess the class.
        n: fresh draws that bound its probability.
        alpha: probability that a certificate may be wrong.
        clip: clip noisy rows to [0, 1], as a part of the base classifier.
        batch: rows a pass; the noise is drawn a pass at a time, so that another number draws other noise.
        seed: root of the noise; each image has a stream of its own.

    Raises:
        InputError: a number that means nothing.
    """

    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    clip: bool = False
    batch: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise InputError(f"sigma must be a positive number, not {self.sigma}")
        if not 0 < self.alpha < 0.5:
            raise InputError(f"alpha must lie between 0 and 0.5, not {self.alpha}")
        for name in ("n0", "n", "batch"):
            check_count(getattr(self, name), name)

    @property
    def largest(self) -> float:
        """The radius where all n draws agree: no certificate goes beyond."""
        return radius(self.n, self.n, self.sigma, self.alpha)

    def check(self, oracle: Oracle) -> None:
        """Refuse what cannot be certified, before a row is asked.

        Raises:
            InputError: the black box depends on what was asked before, so that there is nothing to certify; or it takes rows on
                a grid only, and the noise is not brought onto it.
        """
        box = oracle.box
        if box.stateful:
            raise InputError(f"{box.name} depends on what was asked before: no certificate holds for it")
        if box.levels is not None and not (self.clip and oracle.levels == box.levels):
            raise InputError(
                f"{box.name} takes images of {box.levels} grey levels only: give levels={box.levels}, and clip"
            )

    def certify(self, oracle: Oracle, image: Tensor, truth: int | None = None) -> Certificate:
        """Certify an image [C,H,W] in [0, 1].

        Args:
            oracle: through which the black box is asked.
            image: [C,H,W] in [0, 1].
            truth: its class, where only certified accuracy is wanted: a guess of another class is certified right at no
                radius whatever the n draws say, so that they are not asked, and the image counts as abstained.

        Query cost: n0 + n rows, all on the `certify` ledger; n0 where the guess is not `truth`, or a defense refuses all
        guesses. Other rows that it refuses count as answered otherwise.
        """
        name = sha256(image)
        noise = stream(image.device, self.seed, name, "certify")
        account = clerk(self.seed, name, "certify")
        guessed = self._count(oracle, image, self.n0, noise, account)
        if not len(guessed):
            return Certificate(ABSTAINED, 0.0, 0)
        label = int(guessed.argmax())
        if truth is not None and label != truth:
            return Certificate(ABSTAINED, 0.0, 0)
        counts = self._count(oracle, image, self.n, noise, account)
        hits = int(counts[label]) if label < len(counts) else 0
        certified = radius(hits, self.n, self.sigma, self.alpha)
        return Certificate(label if certified > 0 else ABSTAINED, certified, hits)

    def _count(self, oracle: Oracle, image: Tensor, n: int, noise: torch.Generator, account: int) -> Tensor:
        """How often each class is answered in n draws, int64 [K]; empty where nothing was."""
        counts = torch.zeros(0, dtype=torch.long)
        rows = image.new_empty(min(n, self.batch), *image.shape)
        senders = torch.full((len(rows),), account)
        for start in range(0, n, self.batch):
            part = rows[: n - start]
            part.normal_(std=self.sigma, generator=noise).add_(image)
            answer = oracle.ask(self._sent(oracle, part), senders[: len(part)], {"certify": len(part)})
            seen = torch.bincount(answer.labels[answer.status == ANSWERED])
            if len(seen) > len(counts):
                seen, counts = counts, seen
            counts[: len(seen)] += seen
        return counts

    def _sent(self, oracle: Oracle, rows: Tensor) -> Tensor:
        return oracle.round(rows.clamp_(0, 1) if self.clip else rows)


def certified_share(certificates: list[Certificate], labels: list[int], at: float) -> tuple[int, int]:
    """Images certified with their true class at a radius of at least `at`, and images; an abstention is never right."""
    right = np.array([c.predicted == label and c.radius >= at for c, label in zip(certificates, labels, strict=True)])
    return int(right.sum()), len(right)
