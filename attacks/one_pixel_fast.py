"""Best-first pixel search: what `one-pixel` finds, with a small fraction of its queries. Our own; no paper.

On real networks the loss is smooth where differential evolution treats it as rough: on a CIFAR-10 ResNet-20 the losses of
neighbouring pixels in the same colour correlate by 0.7 to 0.9, and two thirds of their variance belong to the place, not the
colour. So a coarse look at the image tells where to look closer:

1. A grid of pixels, from the centre outwards, each in the corner of the colour cube farthest from its own colour.
2. Best first: the neighbours of the candidate with the least loss whose neighbours were not asked yet. Neighbours are the
   same pixel with one channel at another value of the palette, and the pixels around it, at a few distances.
3. For k > 1 a pixel is placed when `patience` rows brought nothing better, and the next one is searched on top of it, from
   the places that were best before. With k pixels placed, the oldest is taken away and searched again, and so on.

No candidate is asked twice: losses are kept by the set of painted pixels. One pixel is a complete search, which ends when
all candidates of the palette were asked. k pixels go on, with twice the patience each time that no pixel can be improved,
and end when every change of one of them is known. The search draws no random numbers.

Query cost: at most `batch` rows a query, at most H W V^C in all for one pixel and a palette of V values. It ends with the
query that holds the first success.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import Answer, Attack, Norm, Query, Search, Task

from .losses import Loss, check_loss, losses
from .pixels import check_pixels, from_the_centre, paint, pixels_of

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
        loss: margin (difference of log-probabilities to the best other class), probability (of the true or target class) or
            cross-entropy (its logarithm).
    """

    name: ClassVar[str] = "one-pixel-fast"
    knowledge: ClassVar[Literal["label", "score"]] = "score"
    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    pixels: int | None = None
    grid: int = 8
    palette: int = 3
    patience: int = 32
    batch: int = 16
    loss: Loss = "margin"

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        check_loss(self.loss)
        for name, least in (("grid", 1), ("palette", 2), ("patience", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def check(self, task: Task) -> None:
        pixels_of(task, self.pixels)

    def search(self, task: Task) -> Search:
        k = pixels_of(task, self.pixels)
        board = Board(task, self.grid, self.palette)
        patience = math.inf if k == 1 else self.patience
        placed: list[Node] = []
        seeds, best = board.seeds(), math.inf
        stale = asked = 0  # placements without gain, and the rows asked before them
        while True:
            others = placed[1:] if len(placed) == k else placed
            if len(placed) == k:
                seeds = [placed[0], *seeds]
            ranked = yield from self._rank(task, board, others, seeds, patience)
            if not ranked or k == 1:
                return
            loss, node = ranked[0]
            placed = [*others, node]
            seeds = [node for _, node in ranked[: self.grid**2]]
            if loss < best:
                best, stale, asked = loss, 0, len(board.known)
                continue
            stale += 1
            if stale == k:
                if len(board.known) == asked:
                    return
                patience, stale, asked = 2 * patience, 0, len(board.known)

    def _rank(
        self, task: Task, board: Board, others: list[Node], seeds: list[Node], patience: float
    ) -> Generator[Query, Answer, list[tuple[float, Node]]]:
        """Best-first search for one more pixel beside `others`: candidates with their losses, the best first.

        Ends when `patience` rows brought no gain, or when nothing is left to ask. Empty once a row reached the goal.
        """
        found: dict[Node, float] = {}
        reach: dict[Node, float] = {}  # the least loss of those whose neighbour a candidate is
        order = count()  # first come, first served among equals
        heap = [(-math.inf, next(order), node) for node in seeds]
        taken = {position for position, _ in others}
        best, idle = math.inf, 0
        while idle < patience:
            front: dict[Node, None] = {}
            while heap and len(front) < self.batch:
                _, _, node = heapq.heappop(heap)
                if node not in found and node[0] not in taken:
                    front[node] = None
            if not front:
                break
            new = [node for node in front if frozenset([*others, node]) not in board.known]
            if new and (yield from self._ask(task, board, others, new)):
                return []
            for node in front:
                loss = found[node] = board.known[frozenset([*others, node])]
                for neighbour in board.neighbours(node):
                    if loss < reach.get(neighbour, math.inf):  # else it waits further ahead, or was asked
                        reach[neighbour] = loss
                        heapq.heappush(heap, (loss, next(order), neighbour))
            least = min(found[node] for node in front)
            best, idle = min(least, best), 0 if least < best else idle + len(new)
        return sorted((loss, node) for node, loss in found.items())

    def _ask(self, task: Task, board: Board, others: list[Node], nodes: list[Node]) -> Generator[Query, Answer, bool]:
        """Ask the candidates that add one of `nodes` to `others` and note their losses; whether one reached the goal."""
        answer = yield Query(board.painted([[*others, node] for node in nodes]))
        for node, loss in zip(nodes, losses(task, answer, self.loss).tolist(), strict=True):
            board.known[frozenset([*others, node])] = loss
        return task.settled(answer)


class Board:
    """The pixels of an image as places of a search, and what is known of them.

    Args:
        task: the image and its threat model.
        grid: pixels along each side of the coarse grid.
        palette: values that a channel may take.

    Attributes:
        known: losses of all candidates that were asked.
    """

    def __init__(self, task: Task, grid: int, palette: int) -> None:
        self.known: dict[frozenset[Node], float] = {}
        self._task, self._grid = task, grid
        _, self._height, self._width = task.image.shape
        top = (task.levels or 256) - 1
        self._values = torch.linspace(0, 1, palette, device=task.image.device).mul(top).round().unique().div(top)
        self._palette = len(self._values)  # fewer where the threat model has fewer levels
        same = task.image.flatten(1).T[..., None] == self._values
        own = zip(same.any(dim=2).all(dim=1).tolist(), same.int().argmax(dim=2).tolist(), strict=True)
        self._own: set[Node] = {(place, tuple(colour)) for place, (whole, colour) in enumerate(own) if whole}
        stride = max(min(self._height, self._width) // grid, 1)
        steps = [stride >> n for n in range(1, stride.bit_length())] or [1]
        around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
        self._shifts = [(step * y, step * x) for step in steps for y, x in around]

    def seeds(self) -> list[Node]:
        """The grid, from the centre outwards, each pixel in the corner of the colour cube farthest from its own colour."""
        rows, columns = (
            {(2 * i + 1) * size // (2 * self._grid) for i in range(self._grid)} for size in (self._height, self._width)
        )
        farthest = self._task.image.flatten(1).lt(0.5).long().mul(self._palette - 1).T.tolist()
        return [
            (place, tuple(farthest[place]))
            for place in from_the_centre(self._task).tolist()
            if place // self._width in rows and place % self._width in columns
        ]

    def neighbours(self, node: Node) -> Iterator[Node]:
        """The pixel with one channel at another value; the pixels around it in the same colour, far ones first.

        What would paint a pixel in its own colour is left out.
        """
        place, colour = node
        around = [
            (place, (*colour[:channel], value, *colour[channel + 1 :]))
            for channel, own in enumerate(colour)
            for value in range(self._palette)
            if value != own
        ]
        row, column = divmod(place, self._width)
        for down, right in self._shifts:
            y, x = row + down, column + right
            if 0 <= y < self._height and 0 <= x < self._width:
                around.append((y * self._width + x, colour))
        return (neighbour for neighbour in around if neighbour not in self._own)

    def painted(self, candidates: list[list[Node]]) -> Tensor:
        """The rows of candidates of equally many pixels, [n,C,H,W]."""
        device = self._task.image.device
        places = torch.tensor([[place for place, _ in nodes] for nodes in candidates], device=device)
        colours = torch.tensor([[colour for _, colour in nodes] for nodes in candidates], device=device)
        return paint(self._task, places, self._values[colours])
