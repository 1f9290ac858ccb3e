"""Bayesian optimisation in a subspace (Shukla, Sahu, Willmott, Kolter: Simple and Efficient Hard Label Black-box Adversarial
Attacks in Low Query Budget Regimes, KDD 2021; code: github.com/satyanshukla/bayes_attack).

The attack looks for a direction z of a subspace with few dimensions (`decoders.py`) such that the image moved by epsilon
along the decoded direction T(z) reaches the goal,

    l2    clip(x + epsilon T(z) / |T(z)|)
    linf  clip(x + epsilon sign T(z)),   or, without `signs`, clip(x + epsilon clip(T(z) / rms T(z), -1, 1)) at full size

A Gaussian process over directions predicts an objective f(z); the next query is where an acquisition function of the
prediction is highest: expected improvement (`ei`), probability of improvement (`poi`), the mean (`pm`) or an upper
confidence bound (`ucb`). Objectives:

label     The paper's: f = -1 where the label is not the wanted one, 0 where it is. **It never informs the process.** Until
          the first success every observation is -1, and at the first success the attack is over: the prediction is -1
          everywhere, `ei` and `ucb` go where the variance is highest, `poi` and `pm` are constant. Whatever the model answers,
          the queries are the same: a space-filling design in the subspace, no better than the controls `random` and `sobol`,
          beside which the report of the audit configs/bayes-subspace.yaml shows it.
margin    f = log p(best wanted class) - log p(best other class), from the scores. The default where scores are granted.
distance  f = epsilon / r(z), where r is the radius at which the ray along T(z) enters the goal; f >= 1 is a success. From
          labels: a query at radius epsilon / t tells whether f(z) > t. Asked at the prediction itself (t = mean, at most 1),
          each query is worth a bit, and radii beyond epsilon are for learning only. Where the boundary is flat, f is linear
          in z. The default where labels only are granted.

A bit about f(z) tells how high f is at z, and little of the directions beside it. What exploits, `pm` most of all, would ask
next to what it asked before and learn no more; values, which have no noise, tell even neighbours apart. So directions keep
their distance under `distance`: 1 - cosine to each of the n asked before is at least 4 / n, at most 0.1, except where corners
of linf are apart by themselves. Without that, `pm` did no better than `random` in l2. Success of every objective and
acquisition beside the controls: docs/benchmarks.md.

Deviations from the paper beside the informative objectives:

- Points of the process are directions of length 1 and the kernel is isotropic, where the paper fits a lengthscale for each of
  up to 864 latent dimensions in [-2, 2], between whose points all correlation vanishes. The fit: `gaussian_process.py`.
- linf perturbations are corners of the ball (the authors' option `discrete`), and the default decoders are `nni` in linf,
  as in the paper, and `dct` in l2; `fft` is the code's.
- Acquisition functions are maximised over random directions and perturbations of the best one, then by gradient steps, where
  the paper runs L-BFGS-B from the best of 200 random points.
- No direction is asked twice, of the last 500. The prediction is highest where a high value was seen: left to themselves
  `pm` and `poi` ask for the best known point for ever, and lose to chance.
- The value to improve on is the highest posterior mean at the points observed, where the paper takes the highest value
  observed: the same without noise, and no lucky draw of a stochastic model stands in the way of better points.
- A row that succeeds ends the attack, in the initial design too. Where answers are stochastic it is no proof: the process is
  told what it is told of any row, under `label` a first 0, and the search goes on.

Query cost: `initial` + s rows after s steps; `distance` spends the first 15 steps on random directions to learn the scale of
f. The controls: `initial` q rows after q queries. A step with n observations in d dimensions takes O(n^2 + n d) of our own
time; n is at most 500, beyond which the oldest observations are forgotten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError, unknown_name
from robustbox.protocol import ANSWERED, Answer, Attack, Norm, Query, Search, Task

from .decoders import Decoder, DecoderName, decoder
from .losses import losses
from .search_space import WINDOW, SearchSpace

if TYPE_CHECKING:
    from .gaussian_process import Process

Objective = Literal["label", "margin", "distance"]
Acquisition = Literal["ei", "poi", "pm", "ucb", "random", "sobol"]

DIMENSIONS = 100
"""Of the default subspace, before rounding to whole cells."""
FORGOTTEN = 100
"""Of the at most `WINDOW` observations of a process, the oldest that it forgets when it is full."""
GROWTH = 1.5
"""Hyper-parameters are fitted whenever there are this many times more observations than at the last fit."""
STAIRS, UP, DOWN = 15, 2.0, 1.26
"""Steps of the staircase of `distance`; a success doubles the threshold, a failure takes a fifth: a quarter succeed."""
UPPER_QUARTILE = 0.67
"""Of the standard normal distribution: where the staircase ends, in standard deviations of f."""
LENGTHSCALE, NOISE = 2.0, 0.04
"""Of `distance`: nearly linear, and the noise's variance in units of that of f at random directions."""
ROOM, WIDEST = 4.0, 0.1
"""Of `distance`: 1 - cosine to any of the n directions asked before is at least ROOM / n, up to WIDEST: 26 degrees."""


@dataclass(frozen=True)
class BayesSubspace(Attack):
    """Bayesian optimisation of a direction in a subspace, at a fixed radius. Needs epsilon; labels suffice, scores help.

    Args:
        decoder: the subspace: dct, nni or fft; default: nni in linf, dct in l2.
        size: frequencies or cells of the subspace along each side of the image; default: 10 for one channel, 6 for three, so
            that there are about a hundred dimensions.
        objective: label (the paper's, blind), margin (needs scores) or distance (labels, learns from radii beyond epsilon);
            default: margin where scores are granted, else distance.
        acquisition: expected improvement (ei), upper confidence bound (ucb), probability of improvement (poi) or posterior
            mean (pm); pm only exploits, poi nearly so. random and sobol (a low-discrepancy sequence) are the blind controls:
            the same subspace without a process.
        initial: rows of the initial design; rows a query of the controls.
        signs: in linf, move every value by epsilon up or down, as the paper's `discrete`; else by up to epsilon.
        beta: weight of the variance in ucb.
    """

    name: ClassVar[str] = "bayes-subspace"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    needs_epsilon: ClassVar[bool] = True

    decoder: DecoderName | None = None
    size: int | None = None
    objective: Objective | None = None
    acquisition: Acquisition = "ei"
    initial: int = 10
    signs: bool = True
    beta: float = 1.0

    def __post_init__(self) -> None:
        for option, value, known in (
            ("decoder", self.decoder, get_args(DecoderName)),
            ("objective", self.objective, get_args(Objective)),
            ("acquisition", self.acquisition, get_args(Acquisition)),
        ):
            if value is not None and value not in known:
                raise unknown_name(option, value, known)
        if self.size is not None and self.size < 1:
            raise InputError(f"size must be at least 1, got {self.size}")
        if self.initial < 1:
            raise InputError(f"initial must be at least 1, got {self.initial}")
        if not self.beta >= 0:
            raise InputError(f"beta must not be negative, got {self.beta}")

    @property
    def knowledge(self) -> Literal["label", "score"]:  # type: ignore[override]
        """`score` for the objective margin, else `label`."""
        return "score" if self.objective == "margin" and self.acquisition not in ("random", "sobol") else "label"

    def check(self, task: Task) -> None:
        """Refuse an image that is too small for the decoder's size.

        Raises:
            InputError: with the largest size.
        """
        self.subspace(task)

    def subspace(self, task: Task) -> Decoder:
        """From directions to images of the task's shape."""
        channels, height, width = task.image.shape
        name: DecoderName = self.decoder or ("nni" if task.norm == "linf" else "dct")
        return decoder(name, (channels, height, width), self.size or max(round(math.sqrt(DIMENSIONS / channels)), 1))

    def space(self, task: Task) -> SearchSpace:
        """Where the search takes its directions from."""
        # Cells that are moved up or down whatever their size: only corners of the cube differ from each other.
        corners = task.norm == "linf" and self.signs and self.decoder in (None, "nni")
        return SearchSpace(task, self.subspace(task), self.signs, corners, self.acquisition == "sobol")

    def search(self, task: Task) -> Search:
        assert task.epsilon is not None  # needs_epsilon
        space = self.space(task)
        while True:
            points = space.design(self.initial)
            answer = yield Query(space.rows(points, task.epsilon), "init")
            if task.settled(answer):
                return
            if self.acquisition not in ("random", "sobol"):
                break
        objective = self.objective or ("distance" if answer.scores is None else "margin")
        if objective == "distance":
            yield from self._by_side(task, task.epsilon, space)
        else:
            yield from self._by_value(task, task.epsilon, space, objective == "margin", points, answer)

    def _by_value(
        self, task: Task, epsilon: float, space: SearchSpace, scored: bool, points: Tensor, answer: Answer
    ) -> Search:
        """Search at radius epsilon by values of f: the margin of scores, or the paper's -1 and 0."""
        from .gaussian_process import Process

        process, fitted = Process(space.dim, mean=-1.0), 1
        while True:
            values = -losses(task, answer, "margin") if scored else task.reached(answer).float() - 1
            for point, value, status in zip(points, values.tolist(), answer.status.tolist(), strict=True):
                if status == ANSWERED:
                    process.tell(point, value)
            if len(process) >= GROWTH * fitted:
                process.fit()
                fitted = len(process)
            points = self._candidate(process, space)
            answer = yield Query(space.rows(points, epsilon), "step")
            if task.settled(answer):
                return

    def _by_side(self, task: Task, epsilon: float, space: SearchSpace) -> Search:
        """Search by whether f is above thresholds: one bit a query, at any radius epsilon / threshold within the box."""
        from .gaussian_process import Process

        least = epsilon / float(distance(torch.ones_like(task.image)[None], task.norm))  # beyond, all is clipped
        threshold, bits = max(0.5, least), []
        for _ in range(STAIRS):
            points = space.design(1)
            answer = yield Query(space.rows(points, epsilon / threshold), "probe")
            above = task.reached_any(answer)
            if threshold >= 1 and task.settled(answer):
                return
            if not answer.status.any():
                bits.append((points[0], threshold, above))
            threshold = min(threshold * UP, 1.0) if above else max(threshold / DOWN, least)

        # The prior in which f of random directions, whose kernel is about 1 / lengthscale^2 per unit of variance once its
        # constant part is taken off, has its upper quartile where the staircase ended.
        variance = (threshold / UPPER_QUARTILE) ** 2
        process = Process(space.dim, LENGTHSCALE, LENGTHSCALE**2 * variance, NOISE * variance)
        for point, told, above in bits:
            process.tell_side(point, told, above)
        while True:
            with torch.no_grad():
                points = self._candidate(
                    process, space, None if space.corners else min(ROOM / len(space.asked), WIDEST)
                )
                threshold = min(max(float(process.moments(points)[0]), least), 1.0)
            answer = yield Query(space.rows(points, epsilon / threshold), "step")
            above = task.reached_any(answer)
            if threshold >= 1 and task.settled(answer):
                return
            if not answer.status.any():
                process.tell_side(points[0], threshold, above)

    def _candidate(self, process: Process, space: SearchSpace, room: float | None = None) -> Tensor:
        """The next direction [1,d], a fresh one: where the acquisition function of what the process believes is highest.

        `room` is how far from those that were asked (1 - cosine); default: no more than makes it another one.
        """
        from .gaussian_process import SAME, acquisition, maximise

        if not len(process):
            return space.design(1)
        if len(process) >= WINDOW:
            process.forget(FORGOTTEN)
        values = process.means
        best = int(values.argmax())
        function = acquisition(self.acquisition, process, float(values[best]), self.beta)
        with torch.enable_grad():
            return maximise(function, space.starts(process.points[best]), space.asked, space.admit, room or SAME)[None]
