"""Scores whose best perturbation is known in closed form, for the tests of score attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustbox.protocol import ANSWERED, REJECTED, Answer, Norm

from .analytic import Flat, check_box


@dataclass(eq=False)
class Slope(Flat):
    """Class 1 beyond the plane of `Flat`, with logits that are linear in the image; any further class never."""

    classes: int = 2

    def optimum(self, norm: Norm) -> float:
        """The distance of the nearest adversarial."""
        return self.distance if norm == "l2" else self.distance / float(self.normal.abs().sum())

    def __call__(self, rows: Tensor) -> Tensor:
        check_box(rows)
        self.rows += len(rows)
        margin = (rows - 0.5).double().flatten(1) @ self.normal.double().flatten() - self.distance
        return torch.stack([-margin, margin, *[margin.new_full(margin.shape, -9)] * (self.classes - 2)], dim=1).float()

    def answer(self, rows: Tensor) -> Answer:
        """Labels and scores, for `analytic.drive`."""
        scores = self(rows)
        return Answer.of(scores.argmax(dim=1), scores)


@dataclass(eq=False)
class Script:
    """Answers class 0 of two, with a margin a row as scripted; beyond the script, or without one, always 1. Keeps rows.

    Args:
        margins: of the rows in the order in which they are asked.
        refused: positions of rows that are refused.
        spoil: what the scores of a refused row hold; nobody may look at it.
    """

    margins: list[float] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    spoil: float = math.nan
    asked: list[Tensor] = field(default_factory=list)

    def __call__(self, rows: Tensor) -> Answer:
        scores, status = [], []
        for row in rows:
            k = len(self.asked)
            margin = self.margins[k] if k < len(self.margins) else 1.0
            scores.append([self.spoil, -self.spoil] if k in self.refused else [margin, -margin])
            status.append(REJECTED if k in self.refused else ANSWERED)
            self.asked.append(row.clone())
        told = torch.tensor(scores)
        labels = torch.where(torch.tensor(status) == ANSWERED, told.argmax(dim=1), -1)
        return Answer(labels, told, torch.tensor(status, dtype=torch.uint8))


def flat_scores(rows: Tensor) -> Tensor:
    """The same scores whatever the image."""
    return torch.tensor([[2.0, 1.0, 0.0]]).repeat(len(rows), 1)


def three_bands(rows: Tensor) -> Tensor:
    """Bright images are class 1, images that are brighter above than below class 2, others class 0: logits [n,3]."""
    mean = rows.flatten(1).mean(dim=1) - 0.5
    upper, lower = rows.chunk(2, dim=2)
    slant = upper.flatten(1).mean(dim=1) - lower.flatten(1).mean(dim=1)
    return torch.stack([torch.full_like(mean, 1.0), 40 * mean, 20 * slant], dim=1)


def degenerate(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Images without structure, and the smallest."""
    return {
        "black": torch.zeros(shape),
        "white": torch.ones(shape),
        "grey": torch.full(shape, 0.5),
        "pixel": torch.full((1, 1, 1), 0.5),
        "line": torch.full((2, 1, 7), 0.5),
        "two": torch.full((1, 2, 2), 0.5),
    }
