"""Bit depth: rows are rounded to few grey levels before the model sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import BlackBox, Defense

from .transforms import Transformed


@dataclass(frozen=True)
class BitDepth(Defense):
    """Xu et al. 2018, "Feature Squeezing": x <- round(x (2^b - 1)) / (2^b - 1), here always on and not as a detector.

    Deterministic: what an attack changes by less than half a level is not seen at all, what crosses it is seen enlarged.

    Args:
        bits: bits a channel keeps (the paper: 5 for CIFAR-10 and ImageNet, 1 for MNIST; Guo et al. 2018: 3).

    Query cost: one row of the model behind it for each row.

    Raises:
        InputError: not 1 to 8 bits.
    """

    name: ClassVar[str] = "bit-depth"

    bits: int = 5

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise InputError(f"bits of bit-depth must be from 1 to 8, not {self.bits!r}")

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind the rounding."""
        return Rounded(box, self)


class Rounded(Transformed):
    """A black box behind `BitDepth`."""

    def __init__(self, inner: BlackBox, recipe: BitDepth) -> None:
        super().__init__(inner, recipe)
        self._levels = 2**recipe.bits - 1

    def transform(self, rows: Tensor) -> Tensor:
        """Rows [n,C,H,W] rounded to the levels."""
        return rows.mul(self._levels).round_().div_(self._levels)
