"""Median: rows are smoothed by a median filter before the model sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import BlackBox, Defense

from .transforms import Transformed


@dataclass(frozen=True)
class Median(Defense):
    """Xu et al. 2018, "Feature Squeezing": each value becomes the median of its window, here always on and not as a detector.

    The filter of `scipy.ndimage.median_filter`: reflected at the borders (the border itself is repeated); an even window
    reaches one further up and left, and of its two middle values takes the larger.

    Args:
        size: side of the window (the paper: 2 for CIFAR-10 and ImageNet, 3 for MNIST).

    Query cost: one row of the model behind it for each row.

    Raises:
        InputError: a window of less than 1; rows smaller than the window.
    """

    name: ClassVar[str] = "median"

    size: int = 2

    def __post_init__(self) -> None:
        if not (isinstance(self.size, int) and self.size >= 1):
            raise InputError(f"size of median must be a whole number of at least 1, not {self.size!r}")

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind the filter."""
        if box.input_shape is not None and min(box.input_shape[1:]) < self.size:
            raise InputError(f"a median of {self.size} x {self.size} needs images of at least that size")
        return Smoothed(box, self)


class Smoothed(Transformed):
    """A black box behind `Median`."""

    def __init__(self, inner: BlackBox, recipe: Median) -> None:
        super().__init__(inner, recipe)
        self._size = recipe.size

    def transform(self, rows: Tensor) -> Tensor:
        """The medians of rows [n,C,H,W], channel by channel."""
        k = self._size
        for dim in (2, 3):
            before, after = k // 2, (k - 1) // 2
            first, last = rows.narrow(dim, 0, before), rows.narrow(dim, rows.shape[dim] - after, after)
            rows = torch.cat([first.flip(dim), rows, last.flip(dim)], dim=dim)
        windows = rows.unfold(2, k, 1).unfold(3, k, 1).flatten(4)
        return windows.kthvalue(k * k // 2 + 1, dim=4).values
