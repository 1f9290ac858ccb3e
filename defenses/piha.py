"""PIHA: a perceptual image hash of the hue; a query whose hash nearly equals an earlier one's is refused.

Choi et al. 2023, "PIHA: Detection method using perceptual image hashing against query-based adversarial attacks", as the
OARS authors (Feng et al. 2023) implement it:

    blur 3x3 (sigma 1, reflected border)  ->  hue of HSV, 0 to 360  ->  sums over blocks of 7x7 pixels
    ->  8 local binary patterns at radius 1 a block (diagonals interpolated, 0 outside): a symbol of 8 bits
    hit  where at most 5 % of the symbols differ from those of an earlier query: 1 of 25 at 32 pixels, 54 of 1089 at 224

`mode="parity"` is their code, which adds a blank block where 7 divides the side and lets rounding decide the patterns of
flat regions. `fixed` (default) does neither. Their table starts with the hash of a black image that hides hits where it is
nearest: here tables start empty.

Grey pixels have no hue: all grey images collide. One-channel images are refused; colour images that show grey are not told
apart, which is the hash's own weakness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .gate import Shape, StatefulDefense
from .index import SketchIndex, Tokens
from .memory import Memory, Verdict
from .table import RowTable

Codes = NDArray[np.uint8]

_FLAT = 1e-6
"""Share of the largest block sum by which a neighbour may fall short of the centre and count as equal, in mode fixed."""
_NEIGHBOURS = [(0.0, 1.0), (-1.0, 1.0), (-1.0, 0.0), (-1.0, -1.0), (0.0, -1.0), (1.0, -1.0), (1.0, 0.0), (1.0, 1.0)]
"""Directions (down, right) of the eight patterns, counterclockwise from the right."""


@dataclass(frozen=True, kw_only=True)
class PIHA(StatefulDefense):
    """PIHA (Choi et al. 2023): refuses a query whose perceptual hash of the hue nearly equals an earlier one's.

    Args:
        block: side of a block in pixels.
        threshold: share of differing symbols up to which a query is a hit.
        mode: fixed, or parity with the OARS authors' code (a blank block where `block` divides the side, and patterns of flat
            regions as rounding has it).
    """

    name: ClassVar[str] = "piha"

    block: int = 7
    threshold: float = 0.05
    mode: Literal["fixed", "parity"] = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block >= 1, f"block must be at least 1, not {self.block}")
        self.require(0 <= self.threshold < 1, f"threshold must be in [0, 1), not {self.threshold}")

    def check_shape(self, shape: Shape) -> None:
        self.require(
            shape[0] == 3, f"images of {shape[0]} channels have no hue and would all collide: take another gate"
        )
        self.require(min(shape[1:]) > 1, f"images of {shape[1]} x {shape[2]} cannot be blurred: take another gate")

    def secret(self, shape: Shape, generator: torch.Generator) -> None:
        """Nothing: everybody can compute this hash."""

    def prints(self, rows: Tensor, secrets: Sequence[None]) -> Iterable[Codes]:
        """The symbols of each row, uint8 [blocks] each."""
        sums = self.block_sums(hue(blurred(rows.double().clamp(0, 1))))
        slack = _FLAT * sums.abs().amax(dim=(1, 2), keepdim=True) if self.mode == "fixed" else torch.zeros_like(sums)
        codes: Codes = patterns(sums, slack).flatten(1).cpu().numpy()
        return codes

    def block_sums(self, values: Tensor) -> Tensor:
        """Sums over the blocks of [n,H,W], which 0 extends to the right and below: [n,blocks,blocks]."""
        down, right = (self._padding(side) for side in values.shape[1:])
        padded = F.pad(values, (0, right, 0, down))
        return F.avg_pool2d(padded[:, None], self.block)[:, 0] * self.block**2

    def _padding(self, side: int) -> int:
        missing = -side % self.block
        return self.block if self.mode == "parity" and not missing else missing

    def memory(self, secret: None) -> Memory:
        return CodeMemory(self.threshold)


def blurred(rows: Tensor) -> Tensor:
    """Rows [n,3,H,W] under a Gaussian of three taps and sigma 1."""
    side = math.exp(-0.5)
    centre, side = 1 / (1 + 2 * side), side / (1 + 2 * side)
    padded = F.pad(rows, (1, 1, 1, 1), mode="reflect")
    across = side * (padded[..., :-2] + padded[..., 2:]) + centre * padded[..., 1:-1]
    return side * (across[..., :-2, :] + across[..., 2:, :]) + centre * across[..., 1:-1, :]


def hue(rows: Tensor) -> Tensor:
    """The hue of rows [n,3,H,W] in degrees, [n,H,W]: 0 where grey, and the first of equal channels decides."""
    red, green, blue = rows.unbind(1)
    value = rows.amax(dim=1)
    scale = 60 / (value - rows.amin(dim=1) + torch.finfo(torch.float32).eps)
    degrees = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, 120 + (blue - red) * scale, 240 + (red - green) * scale),
    )
    return torch.where(degrees < 0, degrees + 360, degrees)


def patterns(sums: Tensor, slack: Tensor) -> Tensor:
    """Local binary patterns of [n,h,w], uint8: bit p is set where the p-th neighbour is at least the centre less `slack`."""
    padded = F.pad(sums, (1, 1, 1, 1))
    height, width = sums.shape[1:]
    codes = torch.zeros_like(sums, dtype=torch.uint8)
    for bit, (down, right) in enumerate(_NEIGHBOURS):
        diagonal = down != 0 and right != 0
        reach = round(math.sqrt(0.5), 5) if diagonal else 1.0  # rounded as scikit-image rounds it
        neighbour = torch.zeros_like(sums)
        for y, part_y in _between(down * reach):
            for x, part_x in _between(right * reach):
                neighbour += part_y * part_x * padded[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        codes |= (neighbour >= sums - slack).to(torch.uint8) << bit
    return codes


def _between(offset: float) -> list[tuple[int, float]]:
    """The whole offsets around one, with their shares in linear interpolation."""
    low = math.floor(offset)
    share = offset - low
    return [(low, 1 - share), (low + 1, share)] if share else [(low, 1.0)]


class CodeMemory(Memory):
    """Strings of symbols; a hit is a query that differs from a stored one in at most a share `threshold` of them.

    Two strings that differ in at most t symbols agree on at least one of t + 1 pieces (the pigeonhole principle): rows that
    share a piece are looked up, and only these are compared symbol by symbol.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._pieces = SketchIndex()
        self._table = _codes(0)  # until the first row shows how many symbols there are

    def judge(self, print: Codes) -> Verdict:
        most = self._allowed(print)
        for rows, _ in self._pieces.shared(self._tokens(print)):
            differing = (self._table.at(rows) != print).sum(axis=1)
            k = int(differing.argmin())
            if differing[k] <= most:
                return Verdict(True, int(rows[k]))
        return Verdict(False, -1)

    def store(self, print: Codes, verdict: Verdict) -> int:
        if not self._table.rows:
            self._table = _codes(len(print))
        self._table.add(print)
        return self._pieces.add(self._tokens(print))

    def forget(self, before: int) -> None:
        self._pieces.forget(before)
        self._table.forget(before)

    @property
    def stored(self) -> int:
        return len(self._pieces)

    @property
    def nbytes(self) -> int:
        return self._pieces.nbytes + self._table.nbytes

    def _allowed(self, print: Codes) -> int:
        """Symbols that may differ: at most this share, whatever rounding does to the product."""
        return math.floor(self._threshold * len(print) + 1e-9)

    def _tokens(self, print: Codes) -> Tokens:
        """A token for each piece: its number, and a polynomial of its symbols modulo 2^64."""
        pieces = self._allowed(print) + 1
        edges = np.arange(pieces) * len(print) // pieces
        terms = (print.astype(np.int64) + 1) * _FACTORS[: len(print)]
        return np.add.reduceat(terms, edges) ^ (edges * int(_FACTORS[-1]))


def _codes(symbols: int) -> RowTable[Codes]:
    """An empty table of strings of so many symbols."""
    return RowTable(lambda rows: np.empty((rows, symbols), dtype=np.uint8))


_FACTORS: Tokens = np.cumprod(np.full(2**16, 0x5851F42D4C957F2D, dtype=np.int64))
"""Powers of an odd number modulo 2^64. Pieces that collide cost a comparison, not a verdict."""
