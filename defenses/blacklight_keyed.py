"""Blacklight with secrets, our own: shift-proof, blind to where the rounding edges are, and with a threshold that nobody knows.

What an adaptive attacker (OARS; a shift of one pixel) makes of Blacklight, and what is done about it here:

- The salt of Blacklight hangs on positions: an image rolled by one pixel is another image to it. Here windows are hashed
  without one, under a secret key: equal windows count wherever they stand.
- Symbols change at fixed grey levels. Here each row is quantised twice, at offsets o and o + q/2 with o secret, and both
  sketches count: a value near an edge of one is far from the edges of the other.
- OARS keeps every pair of queries just below the threshold, where unrelated images never come close. Here the MEAN of the k
  most similar earlier queries counts too: unrelated images have one accidental likeness, an attack's queries have many.
- OARS finds the threshold by bisection. Here each scope's threshold on the mean is drawn from [lowest, highest].

    hit  where the best match > `threshold` of 2 S hashes (Blacklight's rule), or the mean of the k best > T

Costs twice Blacklight's time and memory. docs/stateful.md has the false positives that the thresholds were chosen by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blacklight import Blacklight, Layout, flat, parts, quantised, sketches, symbol_bits, window_hashes
from .gate import Shape, StatefulDefense
from .index import SketchIndex, Tokens
from .memory import IndexedMemory, Memory, Verdict

MODULUS = 256  # white is not black


class KeyedSecret(NamedTuple):
    """Two offsets in grey levels [1], two keys, and the threshold on the mean."""

    offsets: tuple[Tensor, Tensor]
    keys: tuple[int, int]
    mean: float


@dataclass(frozen=True, kw_only=True)
class BlacklightKeyed(StatefulDefense):
    """Blacklight without a salt, at two secret offsets, judged by the mean of the k best matches too: for adaptive attackers.

    Args:
        width: values in a window (W); null: 20 for images below 64 pixels, 50 from there on.
        step: distance between windows; null: 1 for images below 64 pixels, one pixel (C values) from there on. Shifts by
            whole steps change few windows, others change all.
        quantum: grey levels that one symbol covers (q).
        keep: hashes of each of the two sketches (S).
        threshold: matching hashes of a hit, of 2 S.
        k: how many of the best matches are averaged; earlier queries that are missing count as no match.
        lowest: the least mean of the k best matches, of 2 S, that may make a hit.
        highest: the most that may be needed.
        layout: order of a row's values: hwc or chw.
        levels: grey levels that rows are rounded to before they are hashed; null: none.
    """

    name: ClassVar[str] = "blacklight-keyed"

    width: int | None = None
    step: int | None = None
    quantum: int = 50
    keep: int = 50
    threshold: int = 50
    k: int = 10
    lowest: float = 32.0
    highest: float = 40.0
    layout: Layout = "hwc"
    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._plain()  # checks what they have in common
        self.require(1 <= self.threshold <= 2 * self.keep, f"threshold must be between 1 and {2 * self.keep} (2 keep)")
        self.require(self.k >= 1, f"k must be at least 1, not {self.k}")
        self.require(
            0 < self.lowest <= self.highest, f"0 < lowest <= highest must hold, not {self.lowest}, {self.highest}"
        )

    def check_shape(self, shape: Shape) -> None:
        self._plain().check_shape(shape)

    def windows(self, shape: Shape) -> tuple[int, int]:
        """Width of and distance between the windows of rows (C, H, W)."""
        width, step = self._plain().windows(shape)
        return width, self.step or (1 if step == 1 else shape[0])

    def secret(self, shape: Shape, generator: torch.Generator) -> KeyedSecret:
        device = generator.device
        first, second = torch.randint(2**63 - 1, (2,), generator=generator, device=device).tolist()
        offset = torch.rand(1, generator=generator, device=device) * self.quantum
        share = float(torch.rand(1, generator=generator, device=device, dtype=torch.float64))
        mean = self.lowest + share * (self.highest - self.lowest)
        return KeyedSecret((offset, offset + self.quantum / 2), (first, second), mean)

    def prints(self, rows: Tensor, secrets: Sequence[KeyedSecret]) -> list[Tokens]:
        """Both sketches of each row as one set of at most 2 S hashes, int64."""
        width, step = self.windows((rows.shape[1], rows.shape[2], rows.shape[3]))
        bits = symbol_bits(self.quantum, MODULUS)
        found: list[Tokens] = []
        for part in parts(rows):
            both = []
            for which in (0, 1):
                keys = torch.tensor([secret.keys[which] for secret in secrets[part]], device=rows.device)
                offsets = [secret.offsets[which] for secret in secrets[part]]
                symbols = quantised(flat(rows[part], self.layout, self.levels), offsets, self.quantum, MODULUS)
                both.append(sketches(window_hashes(symbols, keys, width, step, bits), self.keep))
            found += (np.concatenate(pair) for pair in zip(*both, strict=True))
        return found

    def memory(self, secret: KeyedSecret) -> Memory:
        return MeanMemory(self.threshold, self.k, secret.mean)

    def _plain(self) -> Blacklight:
        """The Blacklight whose windows these are."""
        return Blacklight(
            width=self.width, step=self.step, quantum=self.quantum, keep=self.keep, threshold=1, levels=self.levels
        )


class MeanMemory(IndexedMemory):
    """Sketches; a hit matches one earlier row in more than `threshold` hashes, or the k best ones in more than `mean`."""

    def __init__(self, threshold: int, k: int, mean: float) -> None:
        self._threshold, self._k, self._mean = threshold, k, mean
        self._index: SketchIndex = SketchIndex()

    def judge(self, print: Tokens) -> Verdict:
        matches, row = self._index.top(print, self._k, enough=self._threshold + 1)
        hit = bool(matches[0] > self._threshold or matches.mean() > self._mean)
        return Verdict(hit, row, int(matches[0]))
