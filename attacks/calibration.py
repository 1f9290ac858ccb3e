"""How dissimilar an attack's rows must be for a gate to let them pass: a knob's least tolerable value, by bisection.

Every knob is such that larger means less similar. A value is tolerable where the gate refuses at most a share of the rows that
are drawn at it; a trial of a value asks up to `samples` rows, and ends as soon as too many of them were refused:

    best = high;  while high and low are apart:  trial at their (geometric) mean;  tolerable ? high = best = mean : low = mean
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from robustbox.protocol import Knob

PRECISION = 1.05
"""A logarithmic search ends where high is at most this multiple of low."""
LEAN = 0.8
"""Where refusals are dear, trials are this far from the low end of the bracket to the high one, instead of half-way."""
GAIN, REACH = 0.5, 2.0
"""How a settled value follows the gate (`Dial`)."""
CARE = 1.05
"""By which it grows at every refusal, where refusals are dear."""
GROWTH = 1.5
"""By which a settled value grows when a step was refused for good."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where to look for a knob's value, and how.

    Args:
        low, high: the ends of the bracket.
        share: of the rows of a trial, that may be refused.
        samples: rows of a trial.
        steps: most trials.
        log: whether trials are at geometric means.
        early: whether a trial ends at the first decisive count.
    """

    low: float
    high: float
    share: float = 0.05
    samples: int = 20
    steps: int = 16
    log: bool = True
    early: bool = True


LARGE = 64
"""Images of at least this side have the reference's ImageNet bounds."""
REFERENCE: dict[tuple[str, str], tuple[Bounds, Bounds]] = {
    (attack, knob): (Bounds(*small, log=False, early=False), Bounds(*large, log=False, early=False))
    for (attack, knob), (small, large) in {
        ("nes", "sigma"): ((0.05, 0.5, 0.0, 20, 10), (0.01, 0.5, 0.05, 20, 10)),
        ("nes", "step"): ((0.05, 0.05, 0.005, 20, 10), (5e-5, 0.1, 0.13, 20, 10)),
        ("square", "squares"): ((10, 100, 0.0, 5, 10), (50, 100, 0.0, 5, 3)),
        ("square", "side"): ((1, 32, 0.5, 10, 10), (1, 100, 0.5, 10, 10)),
        ("hop-skip-jump", "radius"): ((1, 2, 0.05, 20, 10), (1.5, 5, 0.05, 20, 10)),
        ("qeba", "radius"): ((1, 2, 0.05, 20, 10), (1, 5, 0.05, 20, 10)),
        ("surfree", "angle"): ((5, 80, 0.05, 20, 5), (5, 50, 0.05, 20, 5)),
    }.items()
}
"""The authors' settings for CIFAR-10 and ImageNet: low, high, tolerated share, samples, steps. But: their 100 degrees pass 90,
where the point is the image itself, 80 here; their NES asks every tenth iterate, 0.01 apart, here one that is 0.05 away."""
REFERENCE_ROUNDS = {"nes": 5, "square": 300, "surfree": 100}
"""How often they draw a refused row again, where that is not 20 times."""


def reference_bounds(attack: str, knob: str, image: Tensor) -> Bounds | None:
    """The authors' bounds for images of this size [C,H,W], or None where they adapt no such knob."""
    known = REFERENCE.get((attack, knob))
    return known[min(image.shape[1:]) >= LARGE] if known else None


class Bisection:
    """The search for the least tolerable value, fed with what came of rows drawn at `value`."""

    def __init__(self, bounds: Bounds, integer: bool, lean: float = 0.5) -> None:
        self._bounds, self._integer, self.lean = bounds, integer, lean
        self._low, self._high, self._steps = bounds.low, bounds.high, 0
        self._refused = self._asked = 0
        self.value, self.done = self._next()

    def observe(self, refused: int, asked: int) -> None:
        """Take the outcome of `asked` rows; may end the trial, which moves `value`, and the search (`done`)."""
        self._refused, self._asked = self._refused + refused, self._asked + asked
        bad = self._refused > self._bounds.share * self._bounds.samples
        if self.done or not ((bad and self._bounds.early) or self._asked >= self._bounds.samples):
            return
        if bad:
            self._low = self.value
        else:
            self._high = self.value
        self._refused = self._asked = 0
        self._steps += 1
        self.value, self.done = self._next()

    def _next(self) -> tuple[float, bool]:
        """The value of the next trial; or the best one, when none is left."""
        low, high = self._low, self._high
        middle = low ** (1 - self.lean) * high**self.lean if self._bounds.log else low + self.lean * (high - low)
        if self._integer:
            middle = float(round(middle))
        apart = low < middle < high and (self._integer or not self._bounds.log or high > PRECISION * low)
        go_on = apart and self._steps < self._bounds.steps
        return (middle if go_on else high), not go_on


class Dial:
    """A knob with what is known of a gate's answers to it: on the attack's own schedule, in search of a value, or settled.

    A settled value goes on to follow the gate, upwards. Where the share r of refused rows among the last `samples` is twice
    what is tolerated, it grows by exp(GAIN (r - tolerated)); where most of them were refused, it is searched for again, up to
    `REACH` times as far.

    Args:
        bounds: of the first search.
    """

    def __init__(self, knob: Knob, bounds: Bounds) -> None:
        self.knob, self.bounds = knob, bounds
        self.search: Bisection | None = None
        self.tried = False  # enough rows at the value in force were answered
        self.useless = False  # refused even at the high end
        self._value = 0.0  # a settled one, before it is rounded
        self._refused = self._asked = 0

    def observe(self, refused: int, asked: int, careful: bool) -> bool:
        """Take the outcome of rows drawn at the knob's value; whether that value has changed.

        Args:
            careful: a refusal is dear (it costs an account): searches lean to the safe side, and each counts.
        """
        before = self.knob.value
        if self.search is not None:
            self.search.lean = LEAN if careful else self.search.lean
            self.search.observe(refused, asked)
            self._follow(self.search)
            return self.knob.value != before
        self._refused, self._asked = self._refused + refused, self._asked + asked
        enough, share = self.bounds.samples, self._refused / max(self._asked, self.bounds.samples)
        if before is None:
            if share > (0 if careful else self.bounds.share):
                self.begin(careful)
        elif share > 0.5:
            self.useless = self._value * PRECISION > self.bounds.high
            self.begin(careful)
        elif careful and refused:
            self._set(self._value * CARE)
        elif self._asked >= enough and share > 2 * self.bounds.share:
            self._set(self._value * math.exp(GAIN * (share - self.bounds.share)))
        if self._asked >= enough:
            self.tried, self._refused, self._asked = self.search is None, 0, 0
        return self.knob.value != before

    def begin(self, careful: bool = False) -> None:
        """Search for a value: within the bounds, or from one that became intolerable upwards."""
        bounds = self.bounds
        if self.knob.value is not None:
            bounds = replace(bounds, low=self._value, high=min(REACH * self._value, bounds.high))
        self.tried, self._refused, self._asked = False, 0, 0
        self.search = Bisection(bounds, self.knob.integer, LEAN if careful else 0.5)
        self._follow(self.search)

    def grow(self) -> None:
        """Go further from what the gate remembers, after a refused step."""
        if self.search is None and self.knob.value is not None:
            self._set(self._value * GROWTH)

    def _follow(self, search: Bisection) -> None:
        self._set(search.value)
        if search.done:
            self.search, self.tried = None, True

    def _set(self, value: float) -> None:
        self._value = min(max(value, self.bounds.low), self.bounds.high)
        self.knob.value = float(round(self._value)) if self.knob.integer else self._value
