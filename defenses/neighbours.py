"""Look-up of earlier queries by the distance of their embeddings, exact.

Rows are numbered from 0 in the order in which they were added. Among equally near rows the lowest number wins.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DenseIndex:
    """Embeddings float32 [D] on one device, found by l2 distance.

    Distances are taken from differences, at twice the time of |a|^2 - 2 a.b + |b|^2: that formula loses the digits of near
    neighbours, and near neighbours are what is looked for. Linear in the number of rows, except where `enough` ends the
    search among the newest.

    Memory: 4 D bytes a row, and up to as much again in reserve.
    """

    NEWEST = 512

    def __init__(self, dimensions: int, device: torch.device) -> None:
        self._table = torch.empty(64, dimensions, device=device)
        self._kept_from = 0
        self._rows = 0

    def __len__(self) -> int:
        """Rows that are remembered."""
        return self._rows - self._kept_from

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""
        return len(self) * self._table.shape[1] * self._table.element_size()

    def add(self, vector: Tensor) -> int:
        """Add a row; its number."""
        if self._rows == len(self._table):
            self._table = torch.cat((self._table, torch.empty_like(self._table)))
        self._table[self._rows] = vector
        self._rows += 1
        return self._rows - 1

    def forget(self, before: int) -> None:
        """Forget the rows whose numbers are below `before`."""
        self._kept_from = max(before, self._kept_from)

    def mean_distance(self, vector: Tensor, k: int, enough: float = -1.0) -> tuple[float, int]:
        """The mean distance to the k nearest rows, and the lowest number of a nearest: (inf, -1) with fewer than k rows.

        Args:
            enough: once k rows among the newest have a mean distance of at most this, they are taken for the nearest:
                the mean distance of the k nearest of all can only be smaller.
        """
        distance, nearest = float("inf"), -1
        if len(self) >= k:
            newest = max(self._rows - max(self.NEWEST, k), self._kept_from)
            for start in sorted({newest, self._kept_from}, reverse=True):
                distance, nearest = self._among(start, vector, k)
                if distance <= enough:
                    break
        return distance, nearest

    def _among(self, start: int, vector: Tensor, k: int) -> tuple[float, int]:
        """`mean_distance` among the rows from `start` on."""
        rows = self._table[start : self._rows]
        distances = torch.cdist(vector[None], rows, compute_mode="donot_use_mm_for_euclid_dist")[0]
        mean = distances.topk(k, largest=False).values.double().mean()
        distance, number = torch.stack((mean, distances.argmin().double())).tolist()  # one transfer
        return distance, start + int(number)
