"""Gradient estimates from losses and the steps along them: what NES, ZO-signSGD and Bandits share.

All three walk down a loss within the ball of the threat model: probes around the point where they stand give a gradient g,

    linf  x <- clip(x - h sign(g))      clipped to [x0 - epsilon, x0 + epsilon] and to the box
    l2    x <- clip(x - h g / |g|)      clipped to the box, then shortened to |x - x0| <= epsilon

Every row that is asked lies in the box and in the ball, after rounding to grey levels too: probes as well, so that each of
them may be the success. Clipping takes from an antithetic pair no more than half of its difference, the same for both signs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.distances import distance
from robustbox.protocol import Answer, Knob, Query, Task

from .balls import whole
from .levels import dither
from .moves import ROW_BYTES
from .noise import Noise
from .random import Rays
from .subspaces import Sampler

LENGTHS = 200
"""The longest step over the shortest, as in the authors' code of NES."""

Judge = Callable[[Answer], Tensor]
"""The losses of an answer's rows [n], to be minimised; inf where a row tells nothing."""


class Ball:
    """The rows that a threat model admits: in the box, and no further than a radius from the image.

    Args:
        task: the image, its norm and its grey levels.
        radius: in linf rounded down to whole grey levels.
    """

    def __init__(self, task: Task, radius: float) -> None:
        self._task, self.radius, self._thresholds = task, radius, None
        if task.norm == "l2":
            self._thresholds = dither(task)
        else:
            self.radius = whole(task, radius)
            self._low, self._high = (task.image - self.radius).clamp_(min=0), (task.image + self.radius).clamp_(max=1)

    def nearest(self, points: Tensor) -> Tensor:
        """The points of box and ball to which a step to `points` [n,C,H,W] leads."""
        return self._admit(points)

    def rows(self, points: Tensor) -> Tensor:
        """What is asked for points [n,C,H,W]: the same, in l2 rounded where rows are rounded, and no further than the point."""
        return self._admit(points, self._thresholds)

    def descend(self, point: Tensor, gradient: Tensor, length: float) -> Tensor:
        """One step against a gradient [1,C,H,W]; nowhere where that is 0. The length is l2 or, in linf, that of each value."""
        return self.nearest(torch.add(point, self._unit(gradient), alpha=-length))

    def around(self, point: Tensor, length: float, n: int) -> Tensor:
        """What is asked after n steps of a length from a point [1,C,H,W] in random directions."""
        size, generator = (n, *point.shape[1:]), self._task.generator
        directions = torch.randn(size, generator=generator, device=generator.device)
        return self.rows(torch.add(point, self._unit(directions), alpha=length))

    def _unit(self, directions: Tensor) -> Tensor:
        return directions.sign() if self._task.norm == "linf" else unit(directions)

    def _admit(self, points: Tensor, thresholds: Tensor | None = None) -> Tensor:
        if self._task.norm == "linf":
            return points.clamp(self._low, self._high)
        deltas = points.clamp(0, 1) - self._task.image
        lengths = distance(deltas, "l2").clamp_min(1e-30)
        return Rays(self._task, deltas, None, lengths, lengths, thresholds).at(self.radius)


class Walk:
    """Where a descent stands: its `point` [1,C,H,W] and `ball`, and which of its points the black box has answered.

    The knob `step` is how far from the last answered point (mean absolute difference in linf, length in l2) the next one must
    be to be asked: points in between are passed in silence. Its range is epsilon / 200 to epsilon. Without a value every point
    is asked. A refused point is given up for the last answered one, and each refusal in a row doubles the next step.

    Args:
        task: the image.
        ball: what may be asked.
        point: where to start, in the ball.
    """

    def __init__(self, task: Task, ball: Ball, point: Tensor) -> None:
        self._task, self.ball, self.point = task, ball, point
        self._answered, self._refusals = point, 0
        assert task.epsilon is not None  # the attacks need it
        low, high = task.epsilon / LENGTHS, task.epsilon
        self.knob = Knob("step", low, high, lambda value, n: self.ball.around(self.point, value, n))

    @property
    def known(self) -> bool:
        """Whether the point where it stands was itself answered last."""
        return self.point is self._answered

    def descend(self, gradient: Tensor, length: float) -> Generator[Query, Answer, Answer | None]:
        """One step against a gradient; the answer at its end, or None where there is none. Cost: at most 1 row."""
        self.point = self.ball.descend(self.point, gradient, length * 2.0 ** min(self._refusals, 10))
        if self.knob.value is not None and self._moved() < self.knob.value:
            return None
        answer = yield Query(self.ball.rows(self.point), "step", knobs=(self.knob,))
        if answer.status.any():
            self.point, self._refusals = self._answered, self._refusals + 1
            return None
        self._answered, self._refusals = self.point, 0
        return answer

    def _moved(self) -> float:
        moved = self.point - self._answered
        return float(moved.abs().mean() if self._task.norm == "linf" else torch.linalg.vector_norm(moved))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A gradient [1,C,H,W], and the mean loss of the probes that it comes from: NaN where all were lost, and g is 0."""

    gradient: Tensor
    loss: float


@dataclass(eq=False)
class Prober:
    """Estimates gradients from probes x + sigma u that are drawn around x.

    With `paired`, the antithetic estimate of NES, g = mean_j (L(x + sigma u_j) - L(x - sigma u_j)) u_j / (2 sigma); else
    forward differences, g = mean_j (L(x + sigma u_j) - L(x)) u_j / sigma. Rows come draw by draw, both of a pair next to each
    other and in one group; pairs of which one row tells nothing are left out.

    The knob `sigma` replaces the option of that name; its range is 0.001 to 0.5 a pixel, before clipping.

    Args:
        task: the image.
        sample: draws the u_j from `task.generator`.
        sigma: noise scale, standard deviation of a pixel; at least a grey level where rows are rounded.
        judge: the losses of rows.
        paired: antithetic pairs, or forward differences.
        vote: take the sign of each summand.
        copies: rows asked for each probe; `blur` makes them [n copies,C,H,W] of the probes [n,C,H,W], `judge` makes one of
            their losses.
        knobs: offered beside `sigma`.
    """

    task: Task
    sample: Sampler
    sigma: float
    judge: Judge
    paired: bool = True
    vote: bool = False
    copies: int = 1
    blur: Callable[[Tensor], Tensor] = lambda rows: rows
    knobs: tuple[Knob, ...] = ()

    def __post_init__(self) -> None:
        self.sigma = visible(self.task, self.sigma)
        self.knob = sigma_knob(self.task)

    def estimate(self, walk: Walk, draws: int, base: Tensor | None = None) -> Generator[Query, Answer, Estimate]:
        """The gradient at the point of a walk.

        Args:
            draws: how many u_j.
            base: forward differences: L(x), or None for the mean of the probes.

        Cost: `draws` times `copies`, for pairs twice that, in queries of at most `moves.ROW_BYTES`.
        """
        point, width = walk.point, self.copies * (2 if self.paired else 1)
        total, losses = torch.zeros_like(point), []
        chunk = max(ROW_BYTES // (width * point.numel() * point.element_size()), 1)
        for start in range(0, draws, chunk):
            size = min(chunk, draws - start)
            noise, scales = Noise(self.task.generator, self.sample, size, point), point.new_full((size,), self._scale())
            answer = yield self._query(walk, noise, scales, width)
            judged = self.judge(answer)
            slopes, known = self._slopes(judged, scales, base)
            u = noise.get()
            total += (slopes.to(u.dtype) @ (u.sign() if self.vote else u).flatten(1)).view_as(total)
            losses.append(judged[known.repeat_interleave(2) if self.paired else known])
            del noise, u
        told = torch.cat(losses)
        share = max(len(told) // (2 if self.paired else 1), 1)
        return Estimate(total.div_(share), float(told.mean()))

    def _slopes(self, judged: Tensor, scales: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
        """Difference quotients of the draws [k], 0 where a draw told nothing, and which told something."""
        if self.paired:
            up, down = judged.view(-1, 2).unbind(1)
            known = up.isfinite() & down.isfinite()
            rise, run = up - down, 2 * scales
        else:
            known = judged.isfinite()
            rise, run = judged - (judged[known].mean() if base is None else base), scales
        slopes = torch.where(known, rise / run, 0.0)
        return slopes.sign() if self.vote else slopes, known

    def _query(self, walk: Walk, noise: Noise, scales: Tensor, width: int) -> Query:
        """The probes around where a walk stands; `scales` [draws] follows those that are drawn again."""
        point, ball = walk.point, walk.ball

        def rows(u: Tensor, sigma: float) -> Tensor:
            moved = torch.stack([u, -u], dim=1).flatten(0, 1) if self.paired else u
            return ball.rows(self.blur(torch.add(point, moved, alpha=sigma)))

        def redraw(positions: list[int]) -> Tensor:
            again = sorted({position // width for position in positions})
            scales[again] = self._scale()
            fresh = rows(noise.renew(again), self._scale())
            place = {draw: k for k, draw in enumerate(again)}
            return fresh[[place[position // width] * width + position % width for position in positions]]

        self.knob.draw = lambda value, n: rows(self.sample(-(-n // width)), value)[:n]
        drawn = rows(noise.draw(), self._scale())
        groups = tuple(k // width for k in range(len(drawn))) if width > 1 else None
        return Query(drawn, "probe", redraw, (self.knob, *self.knobs), groups)

    def _scale(self) -> float:
        return self.knob.scale(self.sigma)


def unit(directions: Tensor) -> Tensor:
    """Directions [n,C,H,W] at l2 length 1; 0 stays 0."""
    tiny = torch.finfo(directions.dtype).tiny
    return F.normalize(directions.flatten(1), dim=1, eps=tiny).view_as(directions)


def gaussian(task: Task) -> Sampler:
    """Draws white noise N(0, 1) for the image of a task."""
    generator = task.generator
    return lambda n: torch.randn(n, *task.image.shape, generator=generator, device=generator.device)


def visible(task: Task, sigma: float) -> float:
    """A noise scale, but at least one grey level where rows are rounded."""
    return max(sigma, 1 / (task.levels - 1)) if task.levels else sigma


def sigma_knob(task: Task) -> Knob:
    """The knob `sigma`, noise of probes: 0.001 to 0.5 a pixel before clipping. It proposes the image until `draw` is set."""
    return Knob("sigma", 1e-3, 0.5, lambda value, n: task.image.expand(n, *task.image.shape))
