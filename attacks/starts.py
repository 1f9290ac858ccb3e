"""Where a search without an epsilon starts: a point that reaches the goal, found with few rows."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from functools import partial

import torch
from torch import Tensor

from robustbox.protocol import Answer, Query, Task

from .noise import Drawn
from .subspaces import Sampler, sampler

WAVES = 50
"""Waves asked for a target class of which no image is at hand."""


def find_start(
    task: Task, patterns: int = 4, rivals: int = 10, again: bool = False, bring: bool = True
) -> Generator[Query, Answer, Tensor | None]:
    """A point that reaches the goal [1,C,H,W], or None: far from the image, but not needlessly.

    Candidates come in stages, each one query; the first stage with a success ends the search:

    - targeted: the `rivals` images of the target class in the pool that are nearest to the image;
    - untargeted: the image plus random patterns at amplitudes 1/16, 1/4 and 1 a pixel, each in `patterns` kinds of the
      finest period (2 x 2 pixels, to which networks with strides are weakest), one coarse (8 x 8 cells) and one white;
    - black, white and grey; untargeted also the `rivals` nearest images of other classes in the pool;
    - the image under white noise of amplitude 1/8, 1/2, 2 and 8 a pixel, four times each, at the last of which nothing of it
      is left; untargeted nine times four more of these; targeted, before all noise, `WAVES` waves (`_waves`), ten at a time.

    The successes of that stage are shortened towards the image together, four times, and the shortest is returned. A row that
    is the image itself is none: of a black image, black, for which a stochastic black box may say so.

    Before all of them comes the row that was `brought`, which is returned as it is.

    Args:
        again: after a search that found nothing: leave out the rows that would be the same, and draw the others anew.
        bring: whether to ask what was brought; not where it was asked already.

    Cost: at most 3 (patterns + 2) + rivals + 55 rows for the stages, towards a target rivals + WAVES + 19, and 4 rows for each
    success of one stage; 1 row where one was brought.
    """
    if bring and not again:
        point = yield from brought(task)
        if point is not None:
            return point
    for stage in _starts(task, patterns, 0 if again else rivals, plain=not again):
        reached = task.reached((yield stage.query("init")))
        if reached.any():
            ends = stage.rows[reached.to(stage.rows.device)]
            ends = ends[torch.linalg.vector_norm((ends - task.image).flatten(1), dim=1) > 0]
            if len(ends):
                return (yield from _shortest(task, ends))
    return None


def brought(task: Task) -> Generator[Query, Answer, Tensor | None]:
    """The row that the attacker brings along [1,C,H,W], where there is one and it reaches the goal; else None.

    Cost: 1 row where there is one.
    """
    if task.start is None:
        return None
    row = task.start[None]
    answer = yield Query(row, "init")
    return row if task.reached_any(answer) else None


def _starts(task: Task, patterns: int, rivals: int, plain: bool) -> Iterator[Drawn]:
    """The stages of `find_start`."""
    image = task.image
    channels, height, width = image.shape
    noise = partial(sampler, shape=(channels, height, width), generator=task.generator)

    def along(amplitude: float, rays: Tensor) -> Tensor:
        return torch.add(image, rays, alpha=amplitude).clamp_(0, 1)

    def one_along(amplitude: float, kinds: list[Sampler], position: int) -> Tensor:
        return along(amplitude, kinds[position](1))

    if task.target is not None:
        yield from _pool(task, rivals)
    else:
        side = min(height, width)
        fine, coarse, white = noise("tiles", factor=side / 2), noise("grid", factor=side / 8), noise("full", factor=1)
        kinds = [fine] * patterns + [coarse, white]
        rays = torch.cat([fine(patterns), coarse(1), white(1)])
        for amplitude in (1 / 16, 1 / 4, 1.0):
            yield Drawn(along(amplitude, rays), partial(one_along, amplitude, kinds))
    if plain:
        flat = torch.tensor([0.0, 1.0, 0.5], device=image.device).view(3, 1, 1, 1)
        yield Drawn(flat.repeat(1, channels, height, width))
    yield from _pool(task, rivals) if task.target is None else _waves(task)
    white = noise("full", factor=1)
    for amplitude in (1 / 8, 1 / 2, 2.0, 8.0, *[8.0] * (9 if task.target is None else 0)):
        yield Drawn(along(amplitude, white(4)), partial(one_along, amplitude, [white] * 4))


def _pool(task: Task, count: int) -> Iterator[Drawn]:
    """One stage: the images that are `nearest`."""
    chosen = nearest(task, count)
    if task.pool is not None and len(chosen):
        yield Drawn(task.pool[0][chosen].to(task.image.device))


def _waves(task: Task) -> Iterator[Drawn]:
    """Stages of ten rows: grey waves of any direction, on the image and on plain colours by turns.

    From crest to crest they are 2 pixels to the whole image. Networks take white noise for one class or two, whatever its
    amplitude, and such waves for most (`python scripts/eval_normals.py --starts`).
    """
    image, generator = task.image, task.generator
    channels, *sides = image.shape
    down, right = (torch.arange(side, dtype=torch.float32, device=image.device) for side in sides)

    def wave(position: int) -> Tensor:
        period, turn, phase = torch.rand(3, generator=generator, device=generator.device).unbind()
        rate, turn = torch.pow(2 / min(sides), period) / 2, math.pi * turn
        cycles = rate * torch.cos(turn) * down[:, None] + rate * torch.sin(turn) * right + phase
        colour = torch.rand(channels, 1, 1, generator=generator, device=generator.device)
        ground = colour if position % 2 else image
        return torch.add(ground, torch.sin(2 * math.pi * cycles), alpha=0.5).clamp_(0, 1)[None]

    for _ in range(WAVES // 10):
        yield Drawn(torch.cat([wave(position) for position in range(10)]), wave)


def nearest(task: Task, count: int) -> Tensor:
    """Where in the pool those images of the target class (untargeted: of other classes) are that are nearest in l2.

    Nearest first: int64 [n], n <= count, on the pool's device; none without a pool.
    """
    if task.pool is None:
        return torch.empty(0, dtype=torch.long)
    images, labels = task.pool
    chosen = (labels != task.label if task.target is None else labels == task.target).nonzero().flatten()
    if not len(chosen):
        return chosen.to(images.device)
    # One image at a time: a pool may be large and is not copied.
    distance = torch.stack([torch.dist(images[i].to(task.image.device), task.image) for i in chosen.tolist()])
    return chosen[distance.argsort()[:count].to(chosen.device)].to(images.device)


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
