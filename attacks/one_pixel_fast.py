"""Best-first pixel search: what `one-pixel` finds, with a small fraction of its queries. Our own; no paper.

On real networks the loss is smooth where differential evolution treats it as rough: on a CIFAR-10 ResNet-20 the losses of
neighbouring pixels in the same colour correlate by 0.7 to 0.9, and two thirds of their variance belong to the place, not the
colour. So a coarse look at the image tells where to look closer:

1. A grid of pixels, from the centre outwards, each in the corner of the colour cube farthest from its own colour.
2. Best first: the neighbours of the candidate with the least loss whose neighbours were not asked yet. Neighbours are the
   same pixel with one channel at another value of the palette, and the pixels around it, at a few distances.
3. For k > 1 a pixel is placed when `patience` rows brought nothing better, and the next one is searched on top of it, from
   the places that were best before. With k pixels placed, the oldest is taken away and searched again, and so on.

No candidate is asked twice: losses are kept by the set of painted pixels. One pixel is a complete search: it ends when all
H W V^C candidates of a palette of V values were asked. k pixels go on, with more patience each time that nothing improves.

Query cost: at most `batch` rows a query. It ends with the query that holds the first success.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import Answer, Attack, Norm, Query, Search, Task

from .losses import Loss, check_loss, losses
from .pixels import check_pixels, exactly, from_the_centre, paint, pixels_of, rows_a_query

Node = tuple[int, tuple[int, ...]]
"""A pixel: its position, and a place in the palette for each channel."""


@dataclass(frozen=True)
class OnePixelFast(Attack):
    """One pixel, or up to k, by best-first search on scores: `one-pixel` at a fraction of its queries.

    Args:
        pixels: how many pixels may change at most; default: as many as epsilon allows, or 1.
        grid: pixels along each side of the first coarse look.
        palette: values that a channel may take, evenly spaced from 0 to 1.
        patience: rows without any gain after which a pixel is placed and another one searched; with several pixels.
        batch: rows asked at a time.
        loss: margin (difference of log-probabilities) or probability (of the true or target class).
    """

    name: ClassVar[str] = "one-pixel-fast"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    pixels: int | None = None
    grid: int = 8
    palette: int = 3
    patience: int = 100
    batch: int = 16
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        check_loss(self.loss)
        for name, least in (("grid", 1), ("palette", 2), ("patience", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def search(self, task: Task) -> Search:
        k = pixels_of(task, self.pixels)
        board = Board(task, self.grid, self.palette)
        patience: float = math.inf if k == 1 else self.patience
        placed: list[Node] = []
        seeds, best, stale = board.seeds(), math.inf, 0
        while True:
            others = placed[1:] if len(placed) == k else placed
            ranked = yield from self._rank(task, board, others, seeds, patience)
            if ranked is None or k == 1:
                return
            placed = [*others, ranked[0][1]]
            seeds = [node for _, node in ranked[: self.grid**2]]
            stale = 0 if ranked[0][0] < best else stale + 1
            best = min(best, ranked[0][0])
            if stale == k:
                patience, stale = 2 * patience, 0

    def _rank(
        self, task: Task, board: Board, others: list[Node], seeds: list[Node], patience: float
    ) -> Generator[Query, Answer, list[tuple[float, Node]] | None]:
        """Best-first search for one more pixel beside `others`: candidates with their losses, ascending.

        None once a row reached the goal. Ends when `patience` rows brought no gain or when nothing is left to ask.
        """
        taken = {position for position, _ in others}
        order = count()  # first come, first served among equals
        heap = [(-math.inf, next(order), node) for node in seeds]
        ranked: dict[Node, float] = {}
        best, idle = math.inf, 0
        while heap and idle < patience:
            front: dict[Node, float] = {}
            while heap and len(front) < min(self.batch, rows_a_query(task)):
                _, _, node = heapq.heappop(heap)
                if node not in ranked and node[0] not in taken:
                    front[node] = math.nan
            if not front: break
            yield from ()
        return sorted((loss, node) for node, loss in ranked.items())
