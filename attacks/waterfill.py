"""Waterfill: a hard-label attack that asks where the normal is likely to be, and remembers what it was told (ours).

From the source image x and a boundary point x_b at distance R in direction v, an iteration asks the labels of noisy points,
estimates the boundary's normal n from them, and searches the semicircle between x_b and x in the plane of v and the estimate,
as CGBA does (`cgba.py`). What differs is how few labels it takes:

- **Start.** A climb over the few numbers of a wavelet in a window, or of a piece of a target image (`approach.py`): where the
  boundary is far, it turns before a normal has led anywhere, and the climb goes further in 50 labels than normals do in
  hundreds. In linf rectangles of it are then turned over while that pays; untargeted, RayS replaces both if nearer (`race.py`).
  A row brought along races them too.
- **Model.** The part of n across v is a random vector whose coefficients in a basis of colours, frequencies and places
  (`blocks.py`) are independent. Their variances start from a cautious prior (the middle more than the border, colours where
  waves are long), are raised where v has its energy, and are learnt (`spectrum.py`).
- **Noise.** Its variances share the queries out over the coefficients by water-filling: few queries see a small subspace, many
  see all. Each row is orthogonal to those asked lately (`apart.py`). It has no part along v, since how steeply the boundary
  crosses the ray is not asked, nor along the normal expected so far: where cos(n, known) = 0.7, the unknown rest alone then
  decides the signs, and each tells twice as much of it. Where fewer than a quarter of the rows reach the goal, since the
  boundary bends away, it is centred further out (`Lift`).
- **Estimator.** Gaussian evidence with its precision, faded by `memory` an iteration; the estimate is the posterior mean, which
  shrinks what was hardly asked, in l2 untargeted filtered by the fourth root of v's power spectrum over the whole image. Noise
  is taken as it was sent, after clipping to the box. The arc's end tells one thing more: it lies on the boundary as its start
  does, so the normal has no part along the chord between them.
- **Search.** The arc is tried at the last angle first; what is left beyond it or before it is halved to 0.01: 7 to 9 rows.
  After answers of which more than 85 % succeed it is made more precise, until the noise sees the boundary again.

Noise has the length 0.3 R, at least 1.3 grey levels a pixel where rows are rounded: boundaries are flat for random directions,
and long noise forgives a coarse search. One-sided answers halve it, in linf they quarter it, as far as grey levels let them.

In linf the arc's place is taken by x + clamp(x_b - x + a R n / mean |n|, -r, r) for the estimate n and r < R: the ball's corner
where n is large, which is best on a plane; x_b - x where it is small, and its sign a guess, for there former estimates left
their traces. Noise is 0.15 R a pixel, with no direction left out; where few of its rows reach the goal it is made shorter; and
a, at most 1, is halved where the path then fails, and grows by half where one leads on. Grey levels are dithered (`levels.py`).

Query cost of iteration t = 1, 2, ...: floor(n0 sqrt(t)) probes and about 8 rows of search; n0 is 20, in l2 towards a target 6.
First comes the climb, about 35 rows for images of 8 pixels, 75 of 32 and 180 of 224 (where no pattern reaches the goal,
`starts.find_start`), in linf the flips, 70, 500 (870 towards a target, after a climb of 35) and over 1000, or RayS, over 2 rows
a value, and 30 of what lost to it; and a search inward, 1 row where it leads nowhere.

With `share_prior` (off by default: an image's result then depends on the others) the variances are learnt from the evidence of
all images of a run, in their order. An attack wrapped by another one (`oars:waterfill`) never shares.

It loses where normals are the contrary of the prior (fine colours, border without middle, the finest frequencies of large
images) and few queries are spent; where the boundary turns fast against R, since evidence is then stale; in linf on large
images, where normals lead hardly further than flips; and it gains little in few dimensions or after thousands of queries.

The knob `radius` is the l2 length of a row's noise in the estimates, whose rows can be drawn again. Where it is set, at least
half of its energy is white, and v hints at nothing: a stateful gate takes smooth rows for alike even far apart, and white noise
moves a point little along the normal. Where answers are stochastic, x_b is asked again first.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.protocol import ANSWERED, Answer, Attack, Knob, Norm, Query, Search, Task

from .apart import Asked
from .approach import approach
from .cgba import LEVELS_OF_NOISE, semicircle
from .hop_skip_jump import Lift
from .levels import dither
from .moves import ROW_BYTES, furthest, hold, inward, probes, radius_knob, shrinking
from .noise import Noise
from .spectrum import SHUFFLES, Evidence, K, Spectrum, filtered_like, water_filling

N0 = {"l2": (20, 6), "linf": (20, 20)}
"""Rows of the first estimate, untargeted and towards a target."""
NOISE = {"l2": 0.3, "linf": 0.15}
"""Noise over the distance: its length l2, or in linf its standard deviation a pixel."""
PRECISION, FINEST, DEEP = 0.01, 1e-4, 0.85
"""Bracket at which a search ends, over the distance: usually, and at its finest, where more than the share DEEP succeeds."""
HORIZON = 3.0
"""The queries shared out over those of one iteration: the evidence of about so many is combined."""
HINT = (1 / 3, 1 / 6)
"""The power of what the perturbation hints, untargeted and towards a target."""
SMOOTH = 0.5
"""The share of the noise's variance that is the attack's own at most, where a wrapper sets its length."""
BENT, SHORTER = 0.15, {"l2": 2, "linf": 4}
"""The share of successes in linf below which noise is too long for how the boundary bends; how much shorter it then is made."""
ADDED = 1.0
"""What an estimate adds to the perturbation in linf at most, a mean over pixels, over the distance."""
NEAREST = 1e-15
"""The distance at which a search ends: far below it the squares of float32 are 0."""
FIRST, SEARCH = 0.6, 8
"""The first angle tried (radians; on a straight line the share of the way), and the rows that a search usually takes."""


@dataclass(frozen=True)
class Waterfill(Attack):
    """Waterfill: noise shared out by water-filling over a learnt spectrum of normals. Minimises l2 or linf, knows labels only.

    Args:
        n0: rows of the first normal estimate; estimate t takes floor(n0 sqrt(t)). Default: 20, in l2 towards a target 6.
        memory: share of the evidence that is kept from one iteration to the next.
        learn: learn the spectrum from the answers; else the prior stays as it was at the start.
        share_prior: learn it from all images of a run together; images are then no longer independent.
    """

    name: ClassVar[str] = "waterfill"
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")
    knobs: ClassVar[tuple[str, ...]] = ("radius",)
    takes_start: ClassVar[bool] = True

    n0: int | None = None
    memory: float = 0.9
    learn: bool = True
    share_prior: bool = False

    def __post_init__(self) -> None:
        if (self.n0 is not None and self.n0 < 1) or not 0 <= self.memory <= 1:
            raise InputError(f"n0 must be at least 1, and memory between 0 and 1, not {self.n0} and {self.memory}")

    @property
    def shares(self) -> bool:
        return self.share_prior

    def search(self, task: Task) -> Search:
        return self._search(task, Spectrum(task.image))

    def searches(self, tasks: Sequence[Task]) -> list[Search]:
        common = Spectrum(tasks[0].image) if self.share_prior and tasks else None
        return [self._search(task, common or Spectrum(task.image)) for task in tasks]

    def _search(self, task: Task, spectrum: Spectrum) -> Search:
        knob, lift, number, evidence = radius_knob(task.image), Lift(), spectrum.enter(), Evidence(task.image)
        asked = Asked(spectrum.basis, task.image)
        point = yield from approach(task, FIRST, PRECISION)
        if point is None:
            return
        thresholds = dither(task) if task.norm == "linf" else None
        n0 = self.n0 or N0[task.norm][task.target is not None]
        guess, scale, added, precision = FIRST, 1.0, ADDED, PRECISION
        for t in count(1):
            point = yield from hold(task, point)
            radius = float(distance(point - task.image, task.norm))
            if radius < NEAREST:
                return
            sigma = scale * NOISE[task.norm] * radius / (math.sqrt(task.image.numel()) if task.norm == "l2" else 1.0)
            if task.levels:
                sigma = max(sigma, LEVELS_OF_NOISE / (task.levels - 1))
            least = sigma / 2 if task.levels else 0.0
            least = max(
                least, (knob.value or 0.0) / math.sqrt(task.image.numel())
            )  # a wrapper's noise blurs the search
            tolerance = max(least / radius, precision)
            rows = max(min(int(n0 * math.sqrt(t)), task.remaining - SEARCH), 1)
            evidence.fade(self.memory)
            plain = task.norm == "l2" and knob.value is None
            hint = spectrum.hint(point - task.image) ** HINT[task.target is not None] if plain else None
            prior = spectrum.variances(hint)
            share = yield from _ask(task, point, sigma, rows, prior, evidence, asked, knob, lift)
            precision = max(precision / 4, FINEST) if share > DEEP else min(precision * 1.5, PRECISION)
            if share == 1:  # too deep inside, or on a ridge that noise leaves on both sides
                point, _ = yield from inward(task, point, PRECISION, precision, thresholds)
            bent = share in (0, 1) or (task.norm == "linf" and share < BENT)
            scale = max(scale / SHORTER[task.norm], 1 / 64) if bent else min(scale * 1.5, 1.0)
            if not 0 < share < 1:
                continue
            if self.learn:
                spectrum.learn(number, evidence, prior)
                prior = spectrum.variances(hint)
            normal = spectrum.basis.compose(evidence.mean(prior)[None])
            if hint is not None and task.target is None:
                normal = filtered_like(normal, point - task.image)
            if task.norm == "l2":
                path, end = semicircle(task.image, point, normal), math.pi / 2
            else:
                usual = float(normal.abs().mean().clamp_min(1e-30))
                moved = torch.add(point - task.image, normal, alpha=added * radius / usual)
                path, end = shrinking(task, moved, radius, thresholds), 1.0
            way, guess = yield from furthest(task, path, guess, end, tolerance)
            if way:
                before, point, added = point, path(way), min(added * 1.5, ADDED)
                evidence.rule_out(spectrum.basis.analyse(point - before)[0], prior)
            elif scale < 1:
                added = max(added / 2, ADDED / 64)


def _ask(
    task: Task,
    point: Tensor,
    sigma: float,
    count: int,
    prior: Tensor,
    evidence: Evidence,
    asked: Asked,
    knob: Knob,
    lift: Lift,
) -> Generator[Query, Answer, float]:
    """Ask `count` noisy points around a boundary point [1,C,H,W] and add what they tell to the evidence.

    Returns:
        The share of the answered rows that reached the goal, NaN when there are none. Nothing was added where it is 0 or 1.

    Cost: `count` rows, in queries of at most `ROW_BYTES`, and where a wrapper sets the noise of those that `Lift` says.
    """
    generator, basis, rest = task.generator, asked.basis, evidence.variances(prior)
    shares, across, root = water_filling(rest / rest.sum(), HORIZON * K * K * count), [], math.sqrt(point.numel())
    if task.norm == "l2":
        ray = point - task.image
        known = basis.compose(evidence.mean(prior)[None])
        across = [ray, known - (known * ray).sum() / ray.square().sum() * ray]

    def scale() -> float:
        return sigma if knob.value is None else knob.value / root

    def variances() -> Tensor:
        """Of the noise's coefficients over scale^2: white but for the noise's own part, where a wrapper sets the length."""
        own = 1.0 if knob.value is None else min((sigma / scale()) ** 2, SMOOTH)
        return shares if own == 1 else own * shares + (1 - own)

    def fresh(n: int) -> Tensor:
        return asked.sample(n, variances(), across, generator, noted=False)

    centred = sigma * root if task.norm == "l2" else None  # a length; in linf only a wrapper's noise is centred
    total, drift = point.new_zeros(1 + SHUFFLES, *point.shape[1:]), torch.zeros_like(point)
    positive, answered, waiting = 0, 0, count
    most = max(ROW_BYTES // (point.numel() * point.element_size()), 1)
    while waiting > 0:
        size, length = lift.part(min(most, waiting), knob.value), knob.value or centred
        centre = lift.centre(task, point, length)
        sample = partial(asked.sample, variances=variances(), across=across, generator=generator)  # as things stand now
        drawn = Noise(generator, sample, size, point, fresh)
        answer = yield probes(centre, drawn, sigma, fresh, knob)
        told = answer.status == ANSWERED
        sent = torch.add(centre, drawn.get(), alpha=scale()).clamp_(0, 1).sub_(centre).div_(scale()).flatten(1)[told]
        reached = task.reached(answer)[told]
        signs = (2 * reached.float() - 1).to(point.device)
        orders = [torch.randperm(len(signs), generator=generator, device=generator.device) for _ in range(SHUFFLES)]
        total += (torch.stack([signs, *(signs[order] for order in orders)]) @ sent).view_as(total)
        drift += sent.sum(0).view_as(drift)
        positive, answered, waiting = positive + int(reached.sum()), answered + len(signs), waiting - size
        lift.follow(int(reached.sum()) / len(signs) if len(signs) else math.nan, length)
        asked.keep()
        del drawn, sent
    if 0 < positive < answered:
        total.sub_(drift, alpha=2 * positive / answered - 1)  # HopSkipJump's eq. 16: less variance
        noise, left = variances(), rest if task.norm == "l2" else prior  # in linf nothing is left out of the noise
        evidence.add(basis.analyse(total), answered, noise, (noise * left).sum())
    return positive / answered if answered else math.nan
