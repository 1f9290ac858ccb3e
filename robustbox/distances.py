"""The distances of the threat models, in the units of the image, and their grey levels."""

from __future__ import annotations

import torch
from torch import Tensor

from robustbox.protocol import Norm


def distance(deltas: Tensor, norm: Norm) -> Tensor:
    """The norm of each difference: [n,C,H,W] -> float64 [n].

    `l0` counts changed pixels (a position counts once, whatever its channels do), `l2` is the Euclidean norm over all
    values, `linf` the largest absolute value.
    """
    if norm == "l0":
        return deltas.ne(0).any(dim=1).flatten(1).sum(dim=1).double()
    if norm == "l2":
        lengths: Tensor = torch.linalg.vector_norm(deltas.flatten(1), dim=1, dtype=torch.float64)
        return lengths
    return deltas.flatten(1).abs().amax(dim=1).double()


def rounded(rows: Tensor, levels: int | None) -> Tensor:
    """Rows in [0, 1] as a threat model of so many grey levels transmits them; the same tensor where it does not round."""
    return rows if levels is None else rows.mul(levels - 1).round_().div_(levels - 1)
