"""Moves that several attacks share, as sub-generators: `point = yield from bisect_line(task, ...)`.

Images travel as one row [1,C,H,W]. A row that was not answered (rejected, banned) carries no information: a line search
stops at the best point that it had, an estimate leaves the row out. No move is longer than its docstring says, whatever
the black box answers, and no query holds more than `ROW_BYTES` of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from functools import partial

import torch
from torch import Tensor

from robustbox.protocol import ANSWERED, Answer, Query, Task

from .subspaces import Sampler, sampler

ROW_BYTES = 64 * 2**20
"""Memory of one query's rows: 111 rows of 3 x 224 x 224."""
HELD_BYTES = 2**20
"""Memory of the noise that a search keeps while it waits: 85 rows of 3 x 32 x 32."""
MAX_HALVINGS = 50


def find_start(task: Task, patterns: int = 4, rivals: int = 10) -> Generator[Query, Answer, Tensor | None]:
    """A point that reaches the goal [1,C,H,W], or None: far from the image, but not needlessly.

    Candidates come in stages, each one query; the first stage with a success ends the search:

    - targeted: the `rivals` images of the target class in the pool that are nearest to the image;
    - untargeted: the image plus random patterns at amplitudes 1/16, 1/4 and 1 a pixel, each in `patterns` kinds of the
      finest period (2 x 2 pixels, to which networks with strides are weakest), one coarse (8 x 8 cells) and one white;
    - black, white and grey; untargeted also the `rivals` nearest images of other classes in the pool;
    - the image under white noise of amplitude 1/8, 1/2, 2 and 8 a pixel, where nothing of it is left, four times each.

    The successes of that stage are shortened towards the image together, four times, and the shortest is returned.

    Cost: at most 3 (patterns + 2) + rivals + 19 rows for the stages, and 4 rows for each success of one stage.
    """
    for rows in _starts(task, patterns, rivals):
        answer = yield Query(rows, "init")
        reached = task.reached(answer)
        if reached.any():
            return (yield from _shortest(task, rows[reached.to(rows.device)]))
    return None


def _starts(task: Task, patterns: int, rivals: int) -> Iterator[Tensor]:
    """The stages of `find_start`, each [n,C,H,W]."""
    image = task.image
    channels, height, width = image.shape
    noise = partial(sampler, shape=(channels, height, width), generator=task.generator)
    if task.target is not None:
        yield from _pool(task, rivals)
    else:
        side = min(height, width)
        fine, coarse, white = noise("tiles", factor=side / 2), noise("grid", factor=side / 8), noise("full", factor=1)
        rays = torch.cat([fine(patterns), coarse(1), white(1)])
        for amplitude in (1 / 16, 1 / 4, 1.0):
            yield torch.add(image, rays, alpha=amplitude).clamp_(0, 1)
    yield torch.tensor([0.0, 1.0, 0.5], device=image.device).view(3, 1, 1, 1).repeat(1, channels, height, width)
    if task.target is None:
        yield from _pool(task, rivals)
    for amplitude in (1 / 8, 1 / 2, 2.0, 8.0):
        yield torch.add(image, noise("full", factor=1)(4), alpha=amplitude).clamp_(0, 1)


def _pool(task: Task, count: int) -> Iterator[Tensor]:
    """One stage: the pool's images of the target class (untargeted: of other classes) that are nearest to the image, l2."""
    if task.pool is None:
        return
    images, labels = task.pool
    chosen = (labels != task.label if task.target is None else labels == task.target).nonzero().flatten()
    if len(chosen):
        # One image at a time: a pool may be large and is not copied.
        distance = torch.stack([torch.dist(images[i].to(task.image.device), task.image) for i in chosen.tolist()])
        nearest = chosen[distance.argsort()[:count].to(chosen.device)]
        yield images[nearest.to(images.device)].to(task.image.device)


def _shortest(task: Task, ends: Tensor, halvings: int = 4) -> Generator[Query, Answer, Tensor]:
    """Shorten lines from the image to ends [n,C,H,W] together: a bisection of their common length l2.

    A line that fails at a length where another one succeeds is out of the race. Cost: at most `halvings` n rows.
    """
    image = task.image
    rays = ends - image
    lengths = torch.linalg.vector_norm(rays.flatten(1), dim=1)
    best = lengths.argmin()
    point, far = ends[best], float(lengths[best])
    rays = rays / lengths.view(-1, 1, 1, 1)
    near = 0.0
    for _ in range(halvings):
        length = (near + far) / 2
        rows = (image + rays * length).clamp_(0, 1)
        reached = task.reached((yield Query(rows, "line"))).to(rows.device)
        if reached.any():
            rays, point, far = rays[reached], rows[reached][0], length
        else:
            near = length
    return point[None]


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


def estimate_normal(
    task: Task, point: Tensor, sigma: float, count: int, sample: Sampler
) -> Generator[Query, Answer, tuple[Tensor, float]]:
    """Estimate the direction into the adversarial side at a boundary point, from labels alone.

    The Monte Carlo estimate sum_j s_j u_j of HopSkipJump (Chen et al. 2020, eq. 9), QEBA, GeoDA and CGBA: u_j is noise,
    s_j = +1 where clip(point + sigma u_j) reaches the goal and -1 where not. On a flat boundary in d dimensions its cosine
    with the true normal is about sqrt(q / (q + pi d / 2)) for q = count.

    Args:
        point: on or near the boundary, [1,C,H,W].
        sigma: noise scale, standard deviation of a pixel.
        sample: draws the u_j from `task.generator`.

    Returns:
        The sum over answered rows [1,C,H,W], and the share of them with s_j = +1 (NaN when none was answered). A share of 0
        or 1 means that the noise saw no boundary: the sum is then noise alone.

    Cost: `count` rows, in queries of at most `ROW_BYTES`.
    """
    total, positive, answered = torch.zeros_like(point), 0, 0
    chunk = max(ROW_BYTES // (point.numel() * point.element_size()), 1)
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        # Many searches wait side by side: large noise is not held until the answer is there, but then drawn again.
        if size * point.numel() * point.element_size() <= HELD_BYTES:
            noise = sample(size)
            answer = yield Query(torch.add(point, noise, alpha=sigma).clamp_(0, 1))
        else:
            state = task.generator.get_state()
            answer = yield Query(torch.add(point, sample(size), alpha=sigma).clamp_(0, 1))
            task.generator.set_state(state)
            noise = sample(size)
        reached, known = task.reached(answer), answer.status == ANSWERED
        signs = (2 * reached.float() - known.float()).to(point.device)
        total += (signs @ noise.flatten(1)).view_as(total)
        positive, answered = positive + int(reached.sum()), answered + int(known.sum())
        del noise
    return total, positive / answered if answered else math.nan
