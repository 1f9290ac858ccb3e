"""Rows inside the ball of the threat model, also once they are rounded to its grey levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustbox.distances import rounded
from robustbox.errors import InputError
from robustbox.protocol import Task
from robustbox.records import TOLERANCE

from .levels import on_levels

PASSES = 4
"""Times that a rounded row is shortened by what it is too long; what is left over is rounded towards the image."""
RESERVE = 0.995
"""By how much more it is shortened, because rounding it again changes its length again."""
HALVINGS = 20
"""Of the bracket in which `fill` looks for a scale."""
TIES = 0.1
"""In levels, the range in which `fill` rounds up or down by chance: values of one size need not change all at once."""
SLACK = 1e-3
"""In levels: keeps a whole number of levels whole that floating point stores a little short."""


def check_visible(task: Task, size: float, what: str) -> None:
    """Refuse a change that rounding to the grey levels of the threat model would hide.

    Args:
        size: of the change of a single value.
        what: whose size it is, for the message.

    Raises:
        InputError: it is smaller than a level.
    """
    if task.levels and size * (task.levels - 1) < 1 - SLACK:
        raise InputError(
            f"{what} changes a value by {size:.2g}, which rounding to {task.levels} grey levels hides: "
            f"changes must be at least {1 / (task.levels - 1):.2g}"
        )


def edge(epsilon: float) -> float:
    """The length that a row may have inside a ball, by the engine's slack; whole levels stay whole if stored a little short."""
    return epsilon * (1 + TOLERANCE) + TOLERANCE


def whole(task: Task, size: float) -> float:
    """A size in whole grey levels, rounded down; as it is where rows are not rounded."""
    if not task.levels:
        return size
    steps = task.levels - 1
    return math.floor(edge(size) * steps) / steps


def shorten(task: Task, deltas: Tensor) -> Tensor:
    """Deltas [n,C,H,W] in the ball: cut off at epsilon (linf) or scaled (l2); as they are where there is no epsilon."""
    if task.epsilon is None:
        return deltas
    if task.norm == "linf":
        radius = whole(task, task.epsilon)
        return deltas.clamp(-radius, radius)
    return deltas * _shorter(deltas, task.epsilon)


def fit(task: Task, deltas: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """Rows [n,C,H,W] in the box: the image moved by deltas [n,C,H,W], which are shortened where they leave the ball.

    Where the threat model rounds rows and the ball is l2, they come rounded, and shorter by what rounding added.

    Args:
        thresholds: of `on_levels`: rows are dithered, so that what is less than half a grey level shows.
    """
    image, epsilon = task.image, task.epsilon
    deltas = shorten(task, deltas)
    rows = on_levels(task, deltas, thresholds)
    if not task.levels or epsilon is None or task.norm != "l2":
        return rows
    steps = task.levels - 1
    for _ in range(PASSES):
        sent = rounded(rows, task.levels)
        shorter = _shorter(sent - image, epsilon)
        if bool((shorter == 1).all()):
            return sent
        # Dithered, what is less than a level has a length that goes with the root of its size.
        shrink = shorter if thresholds is None else shorter.square()
        deltas = deltas * torch.where(shorter < 1, shrink * RESERVE, shorter)
        rows = on_levels(task, deltas, thresholds)
    inwards = (deltas.abs() * steps + SLACK).floor_().div_(steps) * deltas.sign()
    return torch.where(shorter < 1, (image + inwards).clamp_(0, 1), sent)


def fill(task: Task, deltas: Tensor, lengths: Tensor, thresholds: Tensor) -> Tensor:
    """Perturbations of whole grey levels [n,C,H,W] that are as long in l2 as they may be, along deltas [n,C,H,W].

    Each delta is scaled by as much as the nearest levels to it allow. Rounded as it is it would be too long or, where most
    values are less than half a level, nothing.

    Args:
        lengths: that none may be longer than, [n].
        thresholds: of `levels.dither`.
    """
    assert task.levels is not None  # where rows are not rounded there is nothing to fill
    steps = task.levels - 1
    sizes, most = deltas.abs().mul_(steps), (lengths.to(deltas.dtype) * steps * (1 + 1e-6)).view(-1, 1, 1, 1)
    offsets = 0.5 + TIES * (thresholds - 0.5)
    low = torch.zeros_like(most)
    high = (most + 1) / sizes.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        moved = torch.linalg.vector_norm((sizes * middle).add_(offsets).floor_(), dim=(1, 2, 3), keepdim=True)
        low, high = torch.where(moved <= most, middle, low), torch.where(moved <= most, high, middle)
    return (sizes * low).add_(offsets).floor_().div_(steps).mul_(deltas.sign())


def _shorter(deltas: Tensor, epsilon: float) -> Tensor:
    """By how much each delta must be scaled to lie in the l2 ball, at most 1: [n,1,1,1]."""
    lengths = torch.linalg.vector_norm(deltas, dim=(1, 2, 3), keepdim=True)
    share: Tensor = epsilon / lengths.clamp_min(epsilon)
    return share
