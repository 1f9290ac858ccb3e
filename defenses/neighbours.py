"""Look-up of earlier queries by the distance of their embeddings, exact.

Rows are numbered from 0 in the order in which they were added. Among equally near rows the lowest number wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .table import RowTable

DIMENSIONS = 12
"""Of the projection by which rows are ruled out. Embeddings of images lie near a subspace of about ten dimensions."""
FIRST = 1.25
"""Radius of the first search, over the distance that is asked for."""
SLACK = 1e-5
"""What single precision may get wrong in squared distances of projections, over the squared lengths."""


class DenseIndex:
    """Embeddings float32 [D] on one device, found by l2 distance.

    Whether the mean distance to the k nearest is at most some bound is decided without looking at most rows: distances
    between orthogonal projections are at most those between the points. Rows are projected on the principal directions of
    `NEWEST` ones, the first that are remembered at once, and kept in tiers sorted by the first of these coordinates, two
    tiers of one size being merged into one. A search within a radius takes from each tier those rows whose first coordinate
    is near enough, of these those whose projection is, and distances of what is left; it ends when what is not within the
    radius cannot matter.

    Distances are taken from differences: |a|^2 - 2 a.b + |b|^2 loses the digits of near neighbours, and near neighbours are
    what is looked for.

    Memory: 4 D + 4 DIMENSIONS + 16 bytes a row, and up to 4 D more in reserve. A tier is forgotten as a whole: behind a window
    of N rows tiers hold at most 3 N, and there are none where N is below `NEWEST` - 1.
    """

    NEWEST = 512

    def __init__(self, dimensions: int, device: torch.device) -> None:
        self._table: RowTable[Tensor] = RowTable(lambda rows: torch.empty(rows, dimensions, device=device))
        self._sealed = 0  # rows below are in tiers or forgotten
        self._tiers: list[_Tier] = []
        self._projection: tuple[Tensor, Tensor] | None = None  # origin [D] and orthonormal columns [D,m]

    def __len__(self) -> int:
        """Rows that are remembered."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Memory in bytes: slots, tiers and projection."""
        tiers = sum(tier.nbytes for tier in self._tiers)
        return self._table.nbytes + tiers + sum(part.nbytes for part in self._projection or ())

    def add(self, vector: Tensor) -> int:
        """Add a row; its number."""
        number = self._table.add(vector)
        if self._table.rows - self._sealed == self.NEWEST:
            self._seal()
        return number

    def forget(self, before: int) -> None:
        """Forget the rows whose numbers are below `before`."""
        self._table.forget(before)
        self._sealed = max(self._sealed, self._table.kept_from)
        self._tiers = [tier for tier in self._tiers if tier.last >= self._table.kept_from]

    def mean_distance(self, vector: Tensor, k: int, within: float = float("inf")) -> tuple[float, int]:
        """The mean distance to the k nearest rows, and the lowest number of a nearest: (inf, -1) with fewer than k rows.

        Args:
            within: whether the mean is at most this is decided exactly. Where it is more, the answer may be (inf, -1); where k
                rows among the newest have one of at most this, the answer is theirs: that of all can only be smaller.
        """
        if len(self) < k:
            return float("inf"), -1
        kept_from, rows = self._table.kept_from, self._table.rows
        newest = kept_from if within == float("inf") else max(rows - max(self.NEWEST, k), kept_from)
        late = torch.arange(newest, rows, device=vector.device)
        gaps = self._distances(self._table.since(newest), vector)
        found, radius = _nearest(late, gaps, k), FIRST * within
        while newest > kept_from and found[0] > within >= 0:
            early = self._near(vector, radius, newest)
            numbers = torch.cat((early, late))
            distances = torch.cat((self._distances(self._table.at(early), vector), gaps))
            inside = distances[distances <= radius]
            if len(inside) >= k:
                return _nearest(numbers, distances, k)
            # Rows outside are farther than the radius, so that a mean of this is one of more.
            if float(inside.double().sum()) + (k - len(inside)) * radius >= k * within:
                return float("inf"), -1
            radius *= 2
        return found

    def _distances(self, rows: Tensor, vector: Tensor) -> Tensor:
        return torch.cdist(vector[None], rows, compute_mode="donot_use_mm_for_euclid_dist")[0]

    def _near(self, vector: Tensor, radius: float, before: int) -> Tensor:
        """The ascending numbers, below `before`, of all rows in tiers within a radius of a vector [D], and of some others."""
        point = self._projected(vector)
        numbers = torch.cat([tier.near(point, radius) for tier in self._tiers])
        return numbers[(numbers >= self._table.kept_from) & (numbers < before)].sort().values

    def _projected(self, rows: Tensor) -> Tensor:
        assert self._projection is not None  # made with the first tier
        origin, directions = self._projection
        return (rows - origin) @ directions

    def _seal(self) -> None:
        """Make a tier of the rows that stand in none."""
        rows = self._table.since(self._sealed)
        if self._projection is None:
            origin = rows.mean(dim=0)
            _, directions = torch.linalg.eigh((rows - origin).T @ (rows - origin))
            self._projection = origin, directions[:, -DIMENSIONS:].flip(1).contiguous()
        numbers = torch.arange(self._sealed, self._table.rows, device=rows.device)
        tier = _Tier.of(numbers, self._projected(rows))
        while self._tiers and len(self._tiers[-1].numbers) == len(tier.numbers):
            older = self._tiers.pop()
            tier = _Tier.of(torch.cat((older.numbers, tier.numbers)), torch.cat((older.points, tier.points)))
        self._tiers.append(tier)
        self._sealed = self._table.rows


def _nearest(numbers: Tensor, distances: Tensor, k: int) -> tuple[float, int]:
    """The mean of the k least distances, and the number of the first least."""
    mean = distances.topk(k, largest=False).values.double().mean()
    distance, position = torch.stack((mean, distances.argmin().double())).tolist()  # one transfer
    return distance, int(numbers[int(position)])


@dataclass(slots=True)
class _Tier:
    """Projected rows: `points` [n,m], sorted by their first coordinate, and their `numbers`, of which `last` is the largest."""

    numbers: Tensor
    points: Tensor
    first: Tensor
    squares: Tensor
    largest: float
    last: int

    @classmethod
    def of(cls, numbers: Tensor, points: Tensor) -> _Tier:
        """A tier of rows in any order."""
        order = points[:, 0].argsort()
        numbers, points = numbers[order], points[order]
        squares = points.square().sum(dim=1)
        return cls(numbers, points, points[:, 0].contiguous(), squares, float(squares.max()), int(numbers.max()))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.numbers, self.points, self.first, self.squares))

    def near(self, point: Tensor, radius: float) -> Tensor:
        """The numbers of at least all rows whose projection lies within a radius of a point [m]."""
        square = float(point.square().sum())
        slack = SLACK * (square + self.largest)
        edge = (radius**2 + slack) ** 0.5
        ends = torch.stack((point[0] - edge, point[0] + edge))
        start, stop = torch.searchsorted(self.first, ends).tolist()
        part = slice(start, stop + 1)
        gaps = torch.addmv(self.squares[part], self.points[part], point, alpha=-2)
        return self.numbers[part][gaps <= radius**2 - square + slack]
