"""Curves with bands as SVG, in steps: what holds after so many queries holds until the next change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
_COLOURS = len(_DASHES)
WIDTH, LEFT, RIGHT = 440.0, 58.0, 16.0
"""Of every picture, and of the margins beside what is plotted; in CSS pixels at full width."""
_HEIGHT, _TOP, _BOTTOM = 280.0, 10.0, 42.0


@dataclass(frozen=True)
class Series:
    """A curve: y, one value for each x, in steps that hold until the next x; infinity where there is no value yet.

    Args:
        name: what the legend says.
        x, y: its points; x ascends.
        low, high: the band around y, or None.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands, 0 at `low` and 1 at `high`; values beyond stand at the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Four to nine round numbers on the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1,)):
                found = [
                    m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high * (1 + 1e-9)
                ]
                if len(found) <= 9:
                    return found
            return found[:: math.ceil(len(found) / 9)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def curves(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Curves with bands in one SVG; a band that reaches to infinity reaches the top, a curve begins where it is finite.

    Args:
        series: the curves.
        title: what the picture shows, for those who do not see it.
        x, y: what the axes are.
        log_x, log_y: logarithmic axes.
        y_range: ends of the y axis; default: those of the values.
    """
    xs = _scale([value for s in series for value in s.x], log_x)
    values = [value for s in series for row in (s.y, s.low or (), s.high or ()) for value in row]
    ys = Scale(*y_range, log_y) if y_range else _scale(values, log_y)
    if xs is None or ys is None or not any(math.isfinite(value) for s in series for value in s.y):
        return Markup('<p class="soft">{}: nothing to draw.</p>').format(title)
    parts = [_axes(xs, ys, x, y)]
    for k, s in enumerate(series):
        points = [
            (_across(xs.place(at)), _down(ys.place(to)) if math.isfinite(to) else None)
            for at, to in zip(s.x, s.y, strict=True)
        ]
        if s.low is not None and s.high is not None:
            parts.append(_band(xs, ys, s, k))
        parts.append(
            Markup('<path class="curve c{}" stroke-dasharray="{}" d="{}"><title>{}</title></path>').format(
                k % _COLOURS, _DASHES[k % _COLOURS], _steps(points), s.name
            )
        )
    height = _HEIGHT
    if len(series) > 1:
        for k, s in enumerate(series):
            at = _HEIGHT + 14 + 18 * k
            parts.append(
                Markup(
                    '<path class="curve c{}" stroke-dasharray="{}" d="M{:.0f} {:.0f}h30"/><text x="{:.0f}" y="{:.0f}">{}</text>'
                ).format(k % _COLOURS, _DASHES[k % _COLOURS], LEFT, at - 4, LEFT + 38, at, s.name)
            )
        height += 18 * len(series) + 4
    return svg(title, height, parts)


def svg(title: str, height: float, parts: Sequence[Markup]) -> Markup:
    """A picture of parts, with a title for those who do not see it."""
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img"><title>{}</title>{}</svg>').format(
        WIDTH, height, title, Markup("").join(parts)
    )


def _scale(values: Sequence[float], log: bool) -> Scale | None:
    """The axis that holds the finite values; on a logarithmic one, the positive ones."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if log:
        return Scale(low / 1.1, high * 1.1, log=True)
    low = min(low, 0.0)
    return Scale(low, high if high > low else low + 1)


def _across(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _down(place: float) -> float:
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _TOP - _BOTTOM)


def _axes(xs: Scale, ys: Scale, x: str, y: str) -> Markup:
    left, right, floor, ceiling = _across(0), _across(1), _down(0), _down(1)
    parts = []
    for tick in ys.ticks():
        at = _down(ys.place(tick))
        parts.append(
            Markup(
                '<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>'
                '<text class="soft" x="{:.1f}" y="{:.1f}" text-anchor="end">{:g}</text>'
            ).format(left, at, right, left - 5, at + 4, _tidy(tick))
        )
    for tick in xs.ticks():
        at = _across(xs.place(tick))
        parts.append(
            Markup(
                '<path class="axis" d="M{:.1f} {:.1f}v4"/>'
                '<text class="soft" x="{:.1f}" y="{:.1f}" text-anchor="middle">{:g}</text>'
            ).format(at, floor, at, floor + 17, _tidy(tick))
        )
    parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}V{:.1f}H{:.1f}"/>').format(left, ceiling, floor, right))
    parts.append(
        Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format((left + right) / 2, floor + 35, x)
    )
    parts.append(
        Markup('<text transform="translate(13 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (floor + ceiling) / 2, y
        )
    )
    return Markup("").join(parts)


def _tidy(tick: float) -> float:
    return float(f"{tick:.6g}")


def _steps(points: Sequence[tuple[float, float | None]]) -> str:
    """A path in steps through points; a point without a height interrupts it."""
    path, drawing = [], False
    for across, down in points:
        if down is None:
            drawing = False
        elif drawing:
            path.append(f"H{across:.1f}V{down:.1f}")
        else:
            path.append(f"M{across:.1f} {down:.1f}")
            drawing = True
    return "".join(path)


def _band(xs: Scale, ys: Scale, s: Series, k: int) -> Markup:
    """The area between low and high, in steps, where low is finite."""
    boxes = []
    low, high = s.low or (), s.high or ()
    for at, until, bottom, top in zip(s.x, [*s.x[1:], s.x[-1]], low, high, strict=True):
        if math.isfinite(bottom) and until > at:
            left, right, up = _across(xs.place(at)), _across(xs.place(until)), _down(ys.place(top))
            boxes.append(f"M{left:.1f} {up:.1f}H{right:.1f}V{_down(ys.place(bottom)):.1f}H{left:.1f}Z")
    return Markup('<path class="band c{}" d="{}"/>').format(k % _COLOURS, "".join(boxes))
