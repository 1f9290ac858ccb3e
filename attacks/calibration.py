"""How dissimilar an attack's rows must be for a gate to let them pass: a knob's least tolerable value, by bisection.

Every knob is such that larger means less similar. A value is tolerable where the gate refuses at most a share of the rows that
are drawn at it; a trial of a value asks up to `samples` rows, and ends as soon as too many of them were refused:

    best = high;  while high and low are apart:  trial at their (geometric) mean;  tolerable ? high = best = mean : low = mean
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from robustbox.protocol import Knob

PRECISION = 1.05
"""A logarithmic search ends where high is at most this multiple of low."""
LEAN = 0.8
"""Where refusals are dear, trials are this far from the low end of the bracket to the high one, instead of half-way."""
DRIFT = 4.0
"""A settled value is given up when the share of refused rows is so many times the one that is tolerated."""
GROWTH = 1.5


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

    Args:
        bounds: of the first search.
    """

    def __init__(self, knob: Knob, bounds: Bounds) -> None:
        self.knob, self.bounds = knob, bounds
        self.search: Bisection | None = None
        self.tried = False  # the value in force stood its first trial
        self.useless = False  # refused even at the high end
        self._refused = self._asked = 0

    @property
    def settled(self) -> bool:
        """Whether a search has found the value in force."""
        return self.search is None and self.knob.value is not None

    def observe(self, refused: int, asked: int, careful: bool) -> bool:
        """Take the outcome of rows drawn at the knob's value; whether that value has changed.

        Args:
            careful: a refusal is dear (it costs an account): none is tolerated, and searches lean to the safe side.
        """
        before = self.knob.value
        if self.search is not None:
            self.search.lean = LEAN if careful else self.search.lean
            self.search.observe(refused, asked)
            self._follow(self.search)
            return self.knob.value != before
        self._refused, self._asked = self._refused + refused, self._asked + asked
        enough = self.bounds.samples
        share = 0.0 if careful else self.bounds.share * (1 if before is None else DRIFT)
        if self._refused > share * max(self._asked, enough):
            self.begin(careful)
        elif self._asked >= enough:
            self.tried, self._refused, self._asked = True, 0, 0
        return self.knob.value != before

    def begin(self, careful: bool = False) -> None:
        """Search for a value: within the bounds, or between one that has become intolerable and the high end."""
        self.tried, self._refused, self._asked = False, 0, 0
        low = self.bounds.low if self.knob.value is None else self.knob.value
        if low * PRECISION >= self.bounds.high:
            self.useless = True
            return
        self.search = Bisection(replace(self.bounds, low=low), self.knob.integer, LEAN if careful else 0.5)
        self._follow(self.search)

    def grow(self) -> None:
        """Go further from what the gate remembers, after a refused step."""
        if self.search is None and self.knob.value is not None:
            grown = min(self.knob.value * GROWTH, self.bounds.high)
            self.knob.value = float(math.ceil(grown)) if self.knob.integer else grown

    def _follow(self, search: Bisection) -> None:
        self.knob.value = search.value
        if search.done:
            self.search, self.tried = None, True
