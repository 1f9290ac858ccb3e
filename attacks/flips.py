"""A climb in linf that flips rectangles of the change (after RayS; ours).

At the nearest point the change is a corner of the ball, so what is left to find is the signs. As in RayS (Chen and Gu, KDD
2020; `rays.py`) a row asks whether the change with the signs of a block turned over reaches the goal nearer by. What differs:

- Blocks are rectangles at random places, of one channel or of all: neighbours in the image, not in memory.
- How much nearer a row is follows from what came of the rows before (`nearer.py`), and the rectangle's size from it:
  turning over a share a of the change gains at most 2 a.

The climb begins at a step of START and ends at one of FLIPS / d for d dimensions, where single values are turned over. About
one row in six is nearer, so a row gains a sixth of a step; with the normals that come after it gains about 2 / d where the
source is near, and less towards targets, where the boundary turns before they have led far. Rows that are rounded are
dithered, as those of RayS are, for most steps are of less than a grey level.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from robustbox.protocol import Answer, Query, Task

from .levels import dither, on_levels
from .nearer import nearer

START, FLIPS = 0.05, 3.0
"""How much nearer the first row is, and the last ones are, times the number of dimensions."""
AREA = (0.5, 3.0)
"""The share of the image that a rectangle covers, over the step: from, to."""
LARGEST = 0.25
"""That share at most."""


def flip(task: Task, row: Tensor) -> Generator[Query, Answer, Tensor]:
    """A point nearer in linf than a row that reaches the goal, both [1,C,H,W].

    Cost: none where START d < FLIPS; else log(FLIPS / (START d)) / log(NARROWER) rows where nothing nearer is found (38 for
    3 x 32 x 32), and as many more as pay: usually 70 for 28 x 28, 500 for 3 x 32 x 32, 870 towards a target.
    """
    image, generator, least = task.image, task.generator, FLIPS / row.numel()
    if least > START:
        return row
    channels, height, width = image.shape
    y, x = (((torch.arange(n, device=image.device) + 0.5) / n) for n in (height, width))
    channel = torch.arange(channels, device=image.device).view(-1, 1, 1)
    thresholds = dither(task)

    def propose(_: int, best: Tensor, __: Tensor, step: float) -> tuple[Tensor, Tensor]:
        low, high = (min(share * step, LARGEST) for share in AREA)
        size, aspect, down, right, which = torch.rand(5, generator=generator, device=generator.device).unbind()
        area, aspect = low * torch.pow(high / low, size), torch.pow(2, 2 * aspect - 1)
        tall, wide = (area * aspect).sqrt().clamp_min(1 / height), (area / aspect).sqrt().clamp_min(1 / width)
        top, left = down * (1 - tall), right * (1 - wide)
        inside = ((y >= top) & (y < top + tall))[:, None] & (x >= left) & (x < left + wide)
        chosen = (which > 0.5) | (channel == (2 * channels * which).floor())
        radius = best.abs().max() * (1 - step)  # not of the row, whose distance is of whole levels where it is rounded
        change = torch.where(inside & chosen, -best, best).clamp(-radius, radius)
        return change, on_levels(task, change, thresholds)[None]

    change = row[0] - image
    far = change.abs().max()
    outward = torch.where(row[0] <= 0, -far, torch.where(row[0] >= 1, far, change))  # as it was before the box cut it
    return (yield from nearer(task, propose, outward, row, START, least))
