"""Perturbations by whole grey levels that can grow and shrink by less than one: dithering, where rows are rounded (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustbox.protocol import Task


def dither(task: Task) -> Tensor | None:
    """Thresholds for `on_levels`, uniform between 0 and 1 [C,H,W]; None where rows are not rounded."""
    if task.levels is None:
        return None
    noise = torch.rand(task.image.shape, generator=task.generator, device=task.image.device)
    return noise.mul_(0.998).add_(1e-3)  # off the edges: whole levels stay whole whatever float32 makes of them


def on_levels(task: Task, deltas: Tensor, thresholds: Tensor | None) -> Tensor:
    """The image moved by deltas [...,C,H,W], in the box; with thresholds, by whole grey levels.

    A share of the values is rounded up to the next level and the others down, by fixed thresholds, so that a perturbation
    can grow and shrink by less than a level; where it is a whole number of levels it is left alone. No value moves by more
    than its delta rounded up.
    """
    if thresholds is not None and task.levels is not None:
        steps = task.levels - 1
        deltas = (deltas.abs() * steps + thresholds).floor_() / steps * deltas.sign()
    return (task.image + deltas).clamp_(0, 1)
