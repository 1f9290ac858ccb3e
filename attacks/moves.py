"""Moves that several attacks share, as sub-generators: `point = yield from bisect_line(task, ...)`.

Images travel as one row [1,C,H,W]. A row that was not answered (rejected, banned) carries no information: a line search
stops at the best point that it had, an estimate leaves the row out. Random rows can be drawn again (`Query.redraw`). No move
is longer than its docstring says, whatever the black box answers, and no query holds more than `ROW_BYTES` of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from robustbox.distances import distance
from robustbox.protocol import ANSWERED, Answer, Knob, Query, Task

from .levels import on_levels
from .noise import Noise
from .subspaces import Sampler

ROW_BYTES = 64 * 2**20
"""Memory of one query's rows: 111 rows of 3 x 224 x 224."""
MAX_HALVINGS = 50
OUTWARD = 5
"""Doublings of the steps by which `hold` goes outward, from 1/32 of the way to the end."""


def bisect_arc(
    task: Task, path: Callable[[float], Tensor], good: float, bad: float, tolerance: float
) -> Generator[Query, Answer, float]:
    """Halve the bracket between a parameter whose point reaches the goal and one whose point does not.

    Args:
        path: from a parameter to a row [1,C,H,W] in [0, 1]; the points of a line, an arc, ...
        good: a parameter at which the goal is known to be reached.
        bad: one at which it is not.
        tolerance: stop when the bracket is no longer than this.

    Returns:
        The last parameter found good: `good` itself when no point between the two reached the goal.

    Cost: ceil(log2(|bad - good| / tolerance)) rows, at most `MAX_HALVINGS`; fewer when a row is not answered.
    """
    halvings = 0
    while abs(bad - good) > tolerance and halvings < MAX_HALVINGS:
        middle = (good + bad) / 2
        answer = yield Query(path(middle), "line")
        if task.reached_any(answer):
            good = middle
        elif answer.status.any():
            break
        else:
            bad = middle
        halvings += 1
    return good


def bisect_line(task: Task, end: Tensor, tolerance: float) -> Generator[Query, Answer, Tensor]:
    """The point [1,C,H,W] nearest to the image on the line to `end` [1,C,H,W] that was found to reach the goal.

    Args:
        tolerance: stop when the bracket is no longer than this, in l2 distance.

    Cost: that of `bisect_arc`, ceil(log2(|end - image| / tolerance)) rows.
    """
    ray = end - task.image
    length = float(torch.linalg.vector_norm(ray))
    if length <= tolerance:
        return end

    def line(t: float) -> Tensor:
        return torch.add(task.image, ray, alpha=t)

    share = yield from bisect_arc(task, line, 1.0, 0.0, tolerance / length)
    return line(share) if share < 1 else end


def furthest(
    task: Task, path: Callable[[float], Tensor], guess: float, end: float, tolerance: float
) -> Generator[Query, Answer, tuple[float, float]]:
    """How far one can go on a path, from a point 0 that reaches the goal towards an end that does not.

    The guess is tried first, then what is left beyond it or before it is halved.

    Returns:
        The furthest point found good, 0 where none was, and the guess for the next time.

    Cost: 1 row and that of `bisect_arc`, usually 7 to 9; a row that is not answered ends it.
    """
    first = min(guess, 0.8 * end)
    answer = yield Query(path(first), "line")
    reached = task.reached_any(answer)
    good, bad = (first, end) if reached else (0.0, first)
    if reached or not answer.status.any():
        good = yield from bisect_arc(task, path, good, bad, tolerance)
    return good, max(good or guess / 2, 4 * tolerance)


def inward(
    task: Task, end: Tensor, guess: float, tolerance: float, thresholds: Tensor | None = None
) -> Generator[Query, Answer, tuple[Tensor, float]]:
    """From a point that reaches the goal [1,C,H,W] towards the source: straight in l2, by a shrinking ball in linf.

    Args:
        thresholds: of `on_levels` in linf: rows are dithered.

    Returns:
        The nearest point found good, and the share of the way that it went, for the next time.
    """
    image = task.image
    radius = float(distance(end - image, task.norm))

    def line(share: float) -> Tensor:
        return torch.lerp(end, image, share)

    path = line if task.norm == "l2" else shrinking(task, end - image, radius, thresholds)
    share, guess = yield from furthest(task, path, guess, 1.0, tolerance)
    return (path(share) if share else end), guess


def shrinking(task: Task, delta: Tensor, radius: float, thresholds: Tensor | None = None) -> Callable[[float], Tensor]:
    """A path in linf: the image with a change [1,C,H,W] cut off at the radius, less a share of it in [0, 1].

    With the thresholds of `on_levels` where it is cut off is dithered: else all values there would change by a whole grey level
    at once, and what lies between is not to be found.
    """

    def path(share: float) -> Tensor:
        far = (1 - share) * radius
        return on_levels(task, delta.clamp(-far, far), thresholds)

    return path


def hold(task: Task, point: Tensor, end: Tensor | None = None) -> Generator[Query, Answer, Tensor]:
    """Ask again the point that a search stands on; while it fails, step from it to the end. For stochastic black boxes.

    One answer is no proof there, and a search that stands on a lucky one gets no further.

    Args:
        point: found to reach the goal once, [1,C,H,W].
        end: a point further out that did too, [1,C,H,W]; default: on the ray from the image, twice as far, clipped.

    Returns:
        The first that reached the goal, or was not answered, of point + t (end - point), t = 0, 1/32, 1/16, ..., 1; the end
        when none did.

    Cost: 1 to 2 + `OUTWARD` rows; none where the same row is always answered alike.
    """
    if not task.stochastic:
        return point
    end = (2 * point - task.image).clamp_(0, 1) if end is None else end
    for t in (0.0, *(2.0 ** (k - OUTWARD) for k in range(OUTWARD + 1))):
        row = torch.lerp(point, end, t).clamp_(0, 1)
        answer = yield Query(row, "line")
        if answer.status.any() or task.reached_any(answer):
            return row
    return end


def radius_knob(image: Tensor) -> Knob:
    """The knob `radius` of `estimate_normal`, to be made once a search: the l2 length of a row's noise, before clipping.

    Its range is 0.001 to 1/8 a pixel, sqrt(d) times that in length: made for a logarithmic search. Each estimate sets its
    `draw`; until the first one it proposes the image itself.

    Args:
        image: [C,H,W].
    """
    length = math.sqrt(image.numel())
    return Knob("radius", 1e-3 * length, length / 8, lambda value, n: image.expand(n, *image.shape))


def estimate_normal(
    task: Task,
    point: Tensor,
    sigma: float,
    count: int,
    sample: Sampler,
    knob: Knob | None = None,
    centred: bool = False,
) -> Generator[Query, Answer, tuple[Tensor, float]]:
    """Estimate the direction into the adversarial side at a boundary point, from labels alone.

    The Monte Carlo estimate sum_j s_j u_j of HopSkipJump (Chen et al. 2020, eq. 9), QEBA, GeoDA and CGBA: u_j is noise,
    s_j = +1 where clip(point + sigma u_j) reaches the goal and -1 where not. On a flat boundary in d dimensions its cosine
    with the true normal is about sqrt(q / (q + pi d / 2)) for q = count.

    Args:
        point: on or near the boundary, [1,C,H,W].
        sigma: noise scale, standard deviation of a pixel.
        sample: draws the u_j from `task.generator`.
        knob: that of `radius_knob`, for wrappers that adapt the noise: its value, where it is set, is sigma sqrt(d).
        centred: subtract the mean of the s_j from each of them (eq. 16), which lowers the variance where their share is not
            1/2; a one-sided estimate stays as it is.

    Returns:
        The sum over answered rows [1,C,H,W], and the share of them with s_j = +1 (NaN when none was answered). A share of 0
        or 1 means that the noise saw no boundary: the sum is then noise alone.

    Cost: `count` rows, in queries of at most `ROW_BYTES`.
    """
    total, drift, positive, answered = torch.zeros_like(point), torch.zeros_like(point), 0, 0
    chunk = max(ROW_BYTES // (point.numel() * point.element_size()), 1)
    for start in range(0, count, chunk):
        drawn = Noise(task.generator, sample, min(chunk, count - start), point)
        answer = yield probes(point, drawn, sigma, sample, knob)
        noise = drawn.get().flatten(1)
        reached, known = task.reached(answer), answer.status == ANSWERED
        signs = (2 * reached.float() - known.float()).to(point.device)
        total += (signs @ noise).view_as(total)
        if centred:
            drift += (known.float().to(point.device) @ noise).view_as(drift)
        positive, answered = positive + int(reached.sum()), answered + int(known.sum())
        del drawn, noise
    share = positive / answered if answered else math.nan
    if centred and 0 < positive < answered:
        total.sub_(drift, alpha=2 * share - 1)
    return total, share


def probes(point: Tensor, noise: Noise, sigma: float, sample: Sampler, knob: Knob | None) -> Query:
    """The query for the rows clip(point + sigma u), which can be drawn again at the scale that is then in force."""
    root = math.sqrt(point.numel())

    def rows(u: Tensor, scale: float) -> Tensor:
        return torch.add(point, u, alpha=scale).clamp_(0, 1)

    def scale() -> float:
        return sigma if knob is None else knob.scale(sigma * root) / root

    if knob is not None:
        knob.draw = lambda radius, n: rows(sample(n), radius / root)
    knobs = () if knob is None else (knob,)
    return Query(rows(noise.draw(), scale()), "probe", lambda which: rows(noise.renew(which), scale()), knobs)
