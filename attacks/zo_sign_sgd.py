"""ZO-signSGD (Liu, Chen, Chen, Hong: signSGD via Zeroth-Order Oracle, ICLR 2019).

Sign descent on a loss L that is small where the goal is near, along zeroth-order gradients of q random directions u_j,
uniform on the sphere of length sqrt(d) in d dimensions:

    x <- clip(x - h / sqrt(k) sign(g))   in iteration k,   clipped to [x0 - epsilon, x0 + epsilon] and to the box, with one of

    forward  g = 1/q sum_j (L(x + sigma u_j) - L(x)) u_j / sigma                     the paper's ZO-signSGD
    central  g = 1/q sum_j (L(x + sigma u_j) - L(x - sigma u_j)) u_j / (2 sigma)     its variant by central differences
    vote     g = 1/q sum_j sign((L(x + sigma u_j) - L(x)) u_j)                       its variant by majority vote

The paper's smoothing parameter, the length of a probe, is mu = sigma sqrt(d); its factor d does not change the sign.

Query cost of an iteration: 1 row for the iterate, which is L(x) and the test of success, and q rows (central: 2 q).

Knobs: `sigma` scales probes, and `step` is how far the iterate must be from the last one that was asked to be asked again:
where it is not asked, the mean of the probes stands for L(x). Directions are drawn again around the current iterate.

Deviations:

- The ball replaces the paper's penalty c |x - x0|_2 on the distance: an audit asks for success at a radius. All rows lie in
  it and in the box, so that a probe may be the success.
- One image an attack, where the paper also looks for one perturbation of many images.
- The step falls with the square root of k; the paper has it constant, at the root of the number of iterations, which an
  attacker who stops at the first success does not know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import ClassVar, Literal, get_args

from torch import Tensor

from robustbox.errors import InputError, unknown_name
from robustbox.protocol import Attack, Norm, Search, Task

from .estimators import Ball, Prober, Walk, gaussian
from .losses import Loss, check_loss, losses
from .subspaces import Sampler

Difference = Literal["forward", "central", "vote"]


@dataclass(frozen=True)
class ZOSignSGD(Attack):
    """ZO-signSGD: sign descent along zeroth-order gradients. Needs epsilon and scores.

    Args:
        directions: random directions q an estimate.
        sigma: root mean square of a probe's noise a pixel; at least one grey level where rows are rounded.
        step: what the first step changes each value by, h; default: a third of epsilon.
        difference: forward, central, or vote (forward, by the majority of signs).
        loss: margin (of log-probabilities) or probability (of the true class, or one minus that of the target).
    """

    name: ClassVar[str] = "zo-sign-sgd"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("linf",)
    needs_epsilon: ClassVar[bool] = True
    knobs: ClassVar[tuple[str, ...]] = ("sigma", "step")

    directions: int = 30
    sigma: float = 0.001
    step: float | None = None
    difference: Difference = "forward"
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise InputError(f"directions must be at least 1, got {self.directions}")
        for option, value in (("sigma", self.sigma), ("step", self.step)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{option} must be positive, got {value}")
        if self.difference not in get_args(Difference):
            raise unknown_name("difference", self.difference, get_args(Difference))
        check_loss(self.loss)

    def search(self, task: Task) -> Search:
        assert task.epsilon is not None  # needs_epsilon
        walk = Walk(task, Ball(task, task.epsilon), task.image[None])
        judge = partial(losses, task, loss=self.loss)
        paired = self.difference == "central"
        prober = Prober(task, sphere(task), self.sigma, judge, paired, self.difference == "vote", knobs=(walk.knob,))
        first = self.step or task.epsilon / 3
        base: Tensor | None = None
        for k in count(1):
            estimate = yield from prober.estimate(walk, self.directions, base if walk.known else None)
            answer = yield from walk.descend(estimate.gradient, first / math.sqrt(k))
            if answer is not None:
                base = judge(answer)


def sphere(task: Task) -> Sampler:
    """Draws noise of root mean square 1 for the image of a task, uniform in direction."""
    draw = gaussian(task)

    def directions(n: int) -> Tensor:
        noise = draw(n)
        return noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt_()

    return directions
