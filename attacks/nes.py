"""NES (Ilyas, Engstrom, Athalye, Lin: Black-box Adversarial Attacks with Limited Queries and Information, ICML 2018; code:
github.com/labsix/limited-blackbox-attacks).

Projected gradient descent on a loss L that is small where the goal is near, with the gradient of natural evolution strategies
over n antithetic pairs of Gaussian noise u_j, momentum m and a step h that is divided by `drop` whenever the loss has not
fallen over the last `plateau` estimates:

    g <- m g + (1 - m) / (2 n sigma) sum_j (L(x + sigma u_j) - L(x - sigma u_j)) u_j
    linf  x <- clip(x - h sign(g)),    l2  x <- clip(x - h g / |g|)            (`estimators.py`)

Three threat models:

query-limited   All scores are seen. Starts from the image. Cost an iteration: 2 n rows for the estimate and 1 for the iterate.
partial         `top` = k. The target's probability is seen while it is among the k likeliest classes (knowledge=top-K).
information     L = 1 - p_target. Starts from an image of the target class in a ball that holds it, and closes in: wherever L
                is small (0.2) it tries to shrink the ball by a share on the way of the step. A candidate that loses the
                target from the top k is tried again at half the step and half the share, at most 8 times; a success doubles
                the share again. Targeted. Cost: `starts.find_start`; an iteration 2 n rows and 1 to 8 for candidates.
label-only      `copies` = c. No scores: L = 1 - S, where S is the share of c copies of a probe with noise U(-spread, spread)
                that have the target's label; else as above, with k = 1. Cost an iteration: 2 n c rows and 1 to 8.

Knobs: `sigma` scales probes (pairs are groups), and `step` is how far the iterate must be from the last one that was asked to
be asked again (query-limited only: elsewhere each candidate must be). Pairs are drawn again around the current iterate.

Deviations:

- All rows lie in the box and in the current ball, so that a probe may be the success. The authors' probes leave both.
- L is by default the margin of log-probabilities, which is the authors' cross-entropy where one other class leads; the
  plateau is one of the loss that is minimised in untargeted attacks too.
- h starts at epsilon / 5, which is the authors' 0.01 at their epsilon of 0.05, and never falls below 1/200 of that. n is 10;
  the authors' 25 are for 299 x 299.
- The ball shrinks by a share of its radius (at first 1/2) where the paper subtracts a length that is only ever halved, and
  `find_start` shortens the line to the start; one candidate serves the paper's step and its shrinking.
- l2 is not in the paper; the step is that of the NES baseline of Ilyas et al. 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, Attack, Norm, Query, Search, Task

from .estimators import LENGTHS, Ball, Estimate, Prober, Walk, gaussian
from .losses import Loss, check_loss, losses
from .starts import find_start

SURE = 0.2
"""Loss below which the ball may shrink: the authors' threshold, cross-entropy 0.2 and 0.15, as a probability."""
SHARE = 0.5
"""By which the ball is first tried to shrink, and at most."""
TRIES = 8
"""Halvings of a candidate's step: those from the authors' longest to their shortest."""


@dataclass(frozen=True)
class NES(Attack):
    """NES: descent along gradients that are estimated from antithetic pairs. Needs epsilon; scores, top-K scores or labels.

    Args:
        pairs: antithetic pairs n an estimate; 25 in the paper.
        sigma: noise of a probe, standard deviation of a pixel; at least one grey level where rows are rounded.
        step: step length at the start, a pixel (linf) or in all (l2); default: a fifth of epsilon.
        momentum: share of the earlier gradient in the next one.
        plateau: estimates over which the loss must have fallen, or the step is shortened.
        drop: what the step is divided by then.
        loss: margin (of log-probabilities) or probability (of the true class, or one minus that of the target).
        top: partial information: the target's probability counts only while it is among so many likeliest classes.
        copies: label-only: noisy copies of each probe; 50 in the authors' code.
        spread: label-only: largest noise of a copy, a pixel.
    """

    name: ClassVar[str] = "nes"
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    needs_epsilon: ClassVar[bool] = True
    knobs: ClassVar[tuple[str, ...]] = ("sigma", "step")
    takes_start: ClassVar[bool] = True

    pairs: int = 10
    sigma: float = 0.001
    step: float | None = None
    momentum: float = 0.9
    plateau: int = 5
    drop: float = 2.0
    loss: Loss = "margin"
    top: int | None = None
    copies: int | None = None
    spread: float = 0.002

    def __post_init__(self) -> None:
        for option in ("pairs", "top", "copies"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"{option} must be at least 1, got {value}")
        for option in ("sigma", "step", "spread"):
            value = getattr(self, option)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{option} must be positive, got {value}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be at least 0 and less than 1, got {self.momentum}")
        if self.plateau < 2:
            raise InputError(f"plateau must be at least 2, got {self.plateau}")
        if not 1 <= self.drop < math.inf:
            raise InputError(f"drop must be at least 1, got {self.drop}")
        if self.top and self.copies:
            raise InputError("top reads scores and copies do without: give one of them")
        check_loss(self.loss)

    @property
    def knowledge(self) -> Literal["label", "score"]:  # type: ignore[override]
        """`label` where `copies` are asked, else `score`."""
        return "label" if self.copies else "score"

    def check(self, task: Task) -> None:
        if (self.top or self.copies) and task.target is None:
            raise InputError("nes with top or copies starts from an image of a target class: give targets and a pool")
        if task.start is not None and not (self.top or self.copies):
            raise InputError(
                "nes begins at the image itself unless top or copies is set: leave starts out, or set one of these"
            )

    def search(self, task: Task) -> Search:
        if self.top or self.copies:
            yield from self._close_in(task)
        else:
            yield from self._descend(task)

    def _descend(self, task: Task) -> Search:
        assert task.epsilon is not None  # needs_epsilon
        walk = Walk(task, Ball(task, task.epsilon), task.image[None])
        judge = partial(losses, task, loss=self.loss)
        prober = Prober(task, gaussian(task), self.sigma, judge, knobs=(walk.knob,))
        pace = _Pace(self, self.step or task.epsilon / 5, torch.zeros_like(walk.point))
        while True:
            pace.take((yield from prober.estimate(walk, self.pairs)))
            yield from walk.descend(pace.gradient, pace.length)

    def _close_in(self, task: Task) -> Search:
        """From an image of the target class, in a ball that shrinks while the target is held."""
        assert task.epsilon is not None  # needs_epsilon
        start = yield from find_start(task)
        if start is None:
            return
        radius, share = float(distance(start - task.image, task.norm)), SHARE
        walk = Walk(task, Ball(task, max(radius, task.epsilon)), start)
        prober = Prober(
            task,
            gaussian(task),
            self.sigma,
            partial(self._judge, task),
            copies=self.copies or 1,
            blur=partial(self._blur, task),
        )
        pace = _Pace(self, self.step or task.epsilon / 5, torch.zeros_like(start))
        while True:
            estimate = yield from prober.estimate(walk, self.pairs)
            pace.take(estimate)
            length, closer = pace.length, share if estimate.loss <= SURE else 0.0
            for _ in range(TRIES):
                ball = Ball(task, max(walk.ball.radius * (1 - closer), task.epsilon))
                candidate = ball.descend(walk.point, pace.gradient, length)
                answer = yield Query(ball.rows(candidate), "step")
                if answer.status.any():
                    break  # a nearer one would be refused as well
                if self._held(task, answer):
                    walk.point, walk.ball = candidate, ball
                    if closer:
                        pace.recent.clear()  # in a smaller ball the loss is higher
                        share = min(2 * closer, SHARE)
                    break
                length, closer = length / 2, closer / 2
            else:
                share /= 2

    def _judge(self, task: Task, answer: Answer) -> Tensor:
        """The loss of each probe; inf where the target was not seen."""
        if self.copies:
            reached, known = task.reached(answer), answer.status == ANSWERED
            shares = reached.view(-1, self.copies).sum(1) / known.view(-1, self.copies).sum(1)
            return (1 - shares).nan_to_num(nan=math.inf).to(task.image.device)
        scores = answer.scores
        assert scores is not None  # the engine grants them
        assert self.top is not None
        assert task.target is not None  # `check`
        least = scores.topk(min(self.top, scores.shape[1]), dim=1).values[:, -1]
        mine = scores[:, task.target]
        return losses(task, answer, "probability").masked_fill((mine < least) | (mine == 0), math.inf)

    def _held(self, task: Task, answer: Answer) -> bool:
        """Whether a candidate still has the target among its top classes."""
        return task.reached_any(answer) if self.copies else bool(self._judge(task, answer).isfinite())

    def _blur(self, task: Task, rows: Tensor) -> Tensor:
        if not self.copies:
            return rows
        many = rows.repeat_interleave(self.copies, dim=0)
        noise = torch.rand(many.shape, generator=task.generator, device=many.device)
        return many.add_(noise.mul_(2).sub_(1), alpha=self.spread)


@dataclass(eq=False)
class _Pace:
    """The gradient's momentum, and the step's length by the plateaus of the loss."""

    attack: NES
    length: float
    gradient: Tensor
    recent: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._least = self.length / LENGTHS

    def take(self, estimate: Estimate) -> None:
        if math.isnan(estimate.loss):
            return
        self.gradient = torch.lerp(estimate.gradient, self.gradient, self.attack.momentum)
        self.recent = [*self.recent, estimate.loss][-self.attack.plateau :]
        if len(self.recent) == self.attack.plateau and self.recent[-1] > self.recent[0]:
            self.length = max(self.length / self.attack.drop, self._least)
            self.recent.clear()
