"""Perturbations of few pixels: how they are decoded and painted, and the two controls that learn nothing from scores.

A candidate changes exactly k pixels of an image [C,H,W]: `positions` int64 [k], ascending, row * W + column; and `colours`
float32 [k,C], whole grey levels j / (L - 1), where L is that of the threat model, or 256. Candidates are kept in this form
and painted when they are asked: a population of 400 is a few kilobytes instead of 400 images.

Equal-budget controls of `one-pixel` and its kin:

    random-pixels      draws candidates at random
    pixel-exhaustive   tries every pixel in every corner of the colour cube; one pixel only
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from robustbox.errors import InputError, unknown_name
from robustbox.protocol import Attack, Norm, Query, Search, Task

from .moves import ROW_BYTES

Colours = Literal["uniform", "corners"]


@dataclass(frozen=True)
class RandomPixels(Attack):
    """Random pixels in random colours: the blind control of `one-pixel`, on labels alone.

    Rows are independent draws with exactly `pixels` changed pixels. It ends at the first success. Query cost: `batch` * q
    rows after q queries.

    Args:
        pixels: how many pixels to change; default: as many as epsilon allows, or 1.
        colours: uniform over all grey levels, or corners of the colour cube (every channel 0 or 1).
        batch: rows drawn at a time.
    """

    name: ClassVar[str] = "random-pixels"
    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    pixels: int | None = None
    colours: Colours = "uniform"
    batch: int = 50

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        if self.colours not in get_args(Colours):
            raise unknown_name("kind of colours", self.colours, get_args(Colours))
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}")

    def check(self, task: Task) -> None:
        pixels_of(task, self.pixels)

    def search(self, task: Task) -> Search:
        k = pixels_of(task, self.pixels)
        size = (min(self.batch, rows_a_query(task)), k, 2 + len(task.image))
        settled = False
        while not settled:
            genes = torch.rand(size, generator=task.generator, device=task.image.device)
            if self.colours == "corners":
                genes[..., 2:] = genes[..., 2:].round()
            answer = yield Query(paint(task, *decode(task, genes)))
            settled = task.settled(answer)


@dataclass(frozen=True)
class PixelExhaustive(Attack):
    """Every pixel in every corner of the colour cube, on labels alone: a cheap and complete look at one extreme pixel.

    First every pixel in the corner farthest from its colour, from the centre of the image outwards; then in the corners that
    differ from the farthest in one channel, and so on. A corner that is the pixel's own colour is left out. It ends at the
    first success. Not an upper bound of what one pixel can do: colours inside the cube are not tried.

    Query cost: at most H W 2^C rows, 8,192 on CIFAR-10 and 1,568 on MNIST; `batch` rows a query.

    Args:
        batch: rows asked at a time.
    """

    name: ClassVar[str] = "pixel-exhaustive"
    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    batch: int = 50

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}")

    def check(self, task: Task) -> None:
        pixels_of(task, 1)

    def search(self, task: Task) -> Search:
        batch = min(self.batch, rows_a_query(task))
        for positions, colours in corners(task):
            for some, theirs in zip(positions.split(batch), colours.split(batch), strict=True):
                answer = yield Query(paint(task, some, theirs))
                if task.settled(answer):
                    return


def corners(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """All one-pixel candidates in corner colours, in the order of `PixelExhaustive`.

    Yields positions [n,1] and colours [n,1,C] for each of the 2^C choices of the channels that leave the farthest corner.
    """
    channels = len(task.image)
    order = from_the_centre(task)
    own = task.image.flatten(1).T[order]  # [HW,C]
    farthest = (own < 0.5).float()
    for flipped in chain.from_iterable(combinations(range(channels), count) for count in range(channels + 1)):
        colours = farthest.clone()
        colours[:, list(flipped)] = 1 - colours[:, list(flipped)]
        new = (colours != own).any(dim=1)
        if not new.any():  # an image of such colours alone
            continue
        yield order[new, None], colours[new, None]


def from_the_centre(task: Task) -> Tensor:
    """All positions of the image, int64 [HW], by their distance from its centre: objects are mostly there."""
    _, height, width = task.image.shape
    rows, columns = (torch.arange(size, device=task.image.device) - (size - 1) / 2 for size in (height, width))
    return (rows[:, None].square() + columns.square()).flatten().argsort(stable=True)


def check_pixels(pixels: int | None) -> None:
    """Refuse a number of pixels that means nothing.

    Raises:
        InputError: fewer than one.
    """
    if pixels is not None and pixels < 1:
        raise InputError(f"pixels must be at least 1, got {pixels}")


def pixels_of(task: Task, pixels: int | None) -> int:
    """How many pixels to change: `pixels`, or by default as many as epsilon allows, or 1.

    Raises:
        InputError: more than epsilon allows or the image has.
    """
    size = task.image[0].numel()
    most = size if task.epsilon is None else min(size, int(task.epsilon))
    if most < (pixels or 1):
        limit = "epsilon allows" if most < size else "the image has"
        raise InputError(f"pixels is {pixels or 1}, but {limit} {most}: ask for fewer pixels or a larger epsilon")
    return pixels or (1 if task.epsilon is None else most)


def rows_a_query(task: Task) -> int:
    """How many rows one query may hold."""
    return max(ROW_BYTES // (task.image.numel() * task.image.element_size()), 1)


def decode(task: Task, genes: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates of n individuals: positions int64 [n,k] and colours float32 [n,k,C].

    Args:
        genes: float [n,k,2+C] in the unit cube: row, column and colour, each cut into as many equal cells as it has values.
    """
    _, height, width = task.image.shape
    rows, columns = _cells(genes[..., 0], height), _cells(genes[..., 1], width)
    levels = task.levels or 256
    return exactly(task, rows * width + columns, _cells(genes[..., 2:], levels) / (levels - 1))


def _cells(genes: Tensor, count: int) -> Tensor:
    return (genes * count).long().clamp_(max=count - 1)


def exactly(task: Task, positions: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates with k distinct positions, ascending, each of which changes its pixel.

    A position that is taken moves on to the next (back from the last pixel), one that keeps its pixel's colour has its first
    channel changed by one level. Candidates that are fine are only sorted; so equal sets of pixels become equal candidates.

    Args:
        positions: int64 [n,k].
        colours: float32 [n,k,C].
    """
    k = positions.shape[1]
    positions, order = positions.sort(dim=1, stable=True)
    colours = colours.gather(1, order[..., None].expand_as(colours))
    steps = torch.arange(k, device=positions.device)
    positions = (positions - steps).cummax(dim=1).values + steps
    positions = positions.minimum(task.image[0].numel() - k + steps)

    same = (colours == task.image.flatten(1).T[positions]).all(dim=2)
    top = (task.levels or 256) - 1
    level = (colours[..., 0] * top).round()
    neighbour = torch.where(level < top, level + 1, level - 1) / top
    return positions, torch.cat([torch.where(same, neighbour, colours[..., 0])[..., None], colours[..., 1:]], dim=2)


def paint(task: Task, positions: Tensor, colours: Tensor) -> Tensor:
    """Rows float32 [n,C,H,W]: the image with positions [n,k] in colours [n,k,C]; all other pixels are the image's, bit for bit.

    Of a position that comes twice in a candidate, any colour may win; `exactly` rules that out.
    """
    n, (channels, height, width) = len(positions), task.image.shape
    rows = task.image.repeat(n, 1, 1, 1)
    index = positions[:, None].expand(-1, channels, -1)
    rows.view(n, channels, height * width).scatter_(2, index, colours.transpose(1, 2))
    return rows
