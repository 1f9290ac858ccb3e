"""Look-up of earlier queries by the tokens that they share: exact and sub-linear.

Rows are numbered from 0 in the order in which they were added. Among equally near rows the lowest number wins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Rows = NDArray[np.int64]
Counts = NDArray[np.int16]

FRESH = 256
"""Rows that a `SketchIndex` holds unsorted before it makes a tier of them."""
COMMON = 32
"""A token that more than one in so many rows of a tier hold is kept as a bitmap: shorter than its list of rows."""


class SketchIndex:
    """Rows of distinct tokens, int64 [S], found by the number of tokens that they share with a query.

    The newest `FRESH` rows stand in a table from token to bitmap; older ones in tiers of sorted (token, row) pairs, two
    tiers of one size being merged into one (as binary digits carry), so that N rows cost O(S log^2 N) to look up where
    they share little. Rows that share much would make long lists; these are bitmaps, counted 64 rows at a time by
    carry-save adders, so that the newest of 20,000 near-identical rows costs little more than the first.

    Memory: about 12 bytes a token, and some 120 a token of the newest rows. A tier is forgotten as a whole: behind a window of
    N rows tiers hold at most 3 N, or `FRESH`.
    """

    def __init__(self) -> None:
        self._tiers: list[_Tier] = []
        self._fresh: dict[int, int] = {}  # from token to bitmap
        self._unsorted: list[Tokens] = []  # the same, row by row
        self._first = 0  # the number of the first fresh row
        self._kept_from = 0
        self._rows = 0

    def __len__(self) -> int:
        """Rows that are remembered."""
        return self._rows - self._kept_from

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        fresh = _size(self._fresh) + sum(tokens.nbytes for tokens in self._unsorted)
        return sum(tier.nbytes for tier in self._tiers) + fresh

    def add(self, tokens: Tokens) -> int:
        """Add a row of distinct tokens; its number."""
        bit = 1 << (self._rows - self._first)
        fresh = self._fresh
        for token in tokens.tolist():
            fresh[token] = fresh.get(token, 0) | bit
        self._unsorted.append(tokens)
        self._rows += 1
        if self._rows - self._first == FRESH:
            self._seal()
        return self._rows - 1

    def forget(self, before: int) -> None:
        """Forget the rows whose numbers are below `before`."""
        self._kept_from = max(before, self._kept_from)
        self._tiers = [tier for tier in self._tiers if tier.first + tier.rows > before]

    def best(self, tokens: Tokens, enough: int | None = None) -> tuple[int, int]:
        """The most tokens that a row shares with the query, and the lowest number of such a row: (0, -1) if none does.

        Args:
            enough: rows are searched in parts, the newest first, and no further once a row shares so many tokens. Whether
                one does is exact; how many and which row are then those of that part.
        """
        counts, row = self.top(tokens, 1, enough)
        return int(counts[0]), row

    def top(self, tokens: Tokens, k: int, enough: int | None = None) -> tuple[Counts, int]:
        """The k largest numbers of tokens that rows share with the query, and the lowest number of a row that shares most.

        Descending, 0 where fewer rows share any; `enough` as for `best`.
        """
        most, where = 0, -1
        found = [np.zeros(k, dtype=np.int16)]
        for rows, counts in self.shared(tokens):
            position = int(counts.argmax())
            if counts[position] >= most:  # an equal is older
                most, where = int(counts[position]), int(rows[position])
            found.append(counts)
            if enough is not None and most >= enough:
                break
        every = np.concatenate(found)
        return np.sort(np.partition(every, len(every) - k)[-k:])[::-1], where

    def shared(self, tokens: Tokens) -> Iterator[tuple[Rows, Counts]]:
        """The rows that share a token with the query and how many they share: in parts, the newest first.

        Row numbers ascend within a part.
        """
        listed = tokens.tolist()
        if bitmaps := [bitmap for token in listed if (bitmap := self._fresh.get(token))]:
            counts = _tally(bitmaps, self._rows - self._first)
            rows = counts.nonzero()[0]
            yield from self._kept(self._first, rows, counts[rows])
        for tier in reversed(self._tiers):
            yield from self._kept(tier.first, *tier.counts(tokens, listed))

    def _kept(self, first: int, rows: Rows, counts: Counts) -> Iterator[tuple[Rows, Counts]]:
        """A part under row numbers of the whole, without the forgotten rows; nothing where none is left."""
        start = int(np.searchsorted(rows, self._kept_from - first)) if first < self._kept_from else 0
        if start < len(rows):
            yield rows[start:] + first, counts[start:]

    def _seal(self) -> None:
        """Make a tier of the fresh rows."""
        holders = np.repeat(np.arange(FRESH, dtype=np.int32), [len(tokens) for tokens in self._unsorted])
        tier = _Tier.of(self._first, FRESH, np.concatenate(self._unsorted), holders)
        while self._tiers and self._tiers[-1].rows == tier.rows:
            tier = _merged(self._tiers.pop(), tier)
        self._tiers.append(tier)
        self._first, self._fresh, self._unsorted = self._rows, {}, []


@dataclass(slots=True)
class _Tier:
    """Rows `first` to `first + rows - 1`, numbered from 0 within: pairs sorted by token, then by row."""

    first: int
    rows: int
    tokens: Tokens
    holders: NDArray[np.int32]
    common: dict[int, int]  # token -> bitmap of its holders

    @classmethod
    def of(cls, first: int, rows: int, tokens: Tokens, holders: NDArray[np.int32]) -> _Tier:
        """A tier of (token, holder) pairs in which the holders of a token ascend."""
        order = np.argsort(tokens, kind="stable")  # quick on what is sorted in runs
        tokens, holders = tokens[order], holders[order]
        edges = np.concatenate(([0], np.flatnonzero(np.diff(tokens)) + 1, [len(tokens)]))
        long = np.flatnonzero(np.diff(edges) * COMMON > rows)
        common = {
            int(tokens[start]): _bitmap(holders[start:stop], rows)
            for start, stop in zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True)
        }
        return cls(first, rows, tokens, holders, common)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.holders.nbytes + _size(self.common)

    def counts(self, tokens: Tokens, listed: list[int]) -> tuple[Rows, Counts]:
        """The rows that hold one of the tokens, ascending, and how many each holds."""
        if not len(self.tokens):
            return _NOWHERE
        starts = np.searchsorted(self.tokens, tokens, side="left")
        found = np.flatnonzero(self.tokens[np.minimum(starts, len(self.tokens) - 1)] == tokens)
        if not len(found):
            return _NOWHERE
        stops = np.searchsorted(self.tokens, tokens[found], side="right")
        bitmaps: list[int] = []
        lists: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        for k, start, stop in zip(found.tolist(), starts[found].tolist(), stops.tolist(), strict=True):
            if bitmap := self.common.get(listed[k]):
                bitmaps.append(bitmap)
            else:
                lists.append(self.holders[start:stop])
        holders = np.concatenate(lists)
        if not bitmaps and len(holders) * COMMON < self.rows:
            few, held = np.unique(holders, return_counts=True)
            return few.astype(np.int64), held.astype(np.int16)
        counts = _tally(bitmaps, self.rows)
        if len(holders):
            counts += np.bincount(holders, minlength=self.rows).astype(np.int16)
        rows = counts.nonzero()[0]
        return rows, counts[rows]


_NOWHERE = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int16)


def _merged(older: _Tier, newer: _Tier) -> _Tier:
    tokens = np.concatenate((older.tokens, newer.tokens))
    holders = np.concatenate((older.holders, newer.holders + older.rows))
    return _Tier.of(older.first, older.rows + newer.rows, tokens, holders.astype(np.int32))


def _size(bitmaps: dict[int, int]) -> int:
    """Memory in bytes of a table from token to bitmap."""
    return sys.getsizeof(bitmaps) + sum(sys.getsizeof(part) for pair in bitmaps.items() for part in pair)


def _bitmap(positions: NDArray[np.int32], rows: int) -> int:
    """A number whose bits are set at the positions."""
    bits = np.zeros(rows, dtype=np.uint8)
    bits[positions] = 1
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def _bits(bitmap: int, rows: int) -> NDArray[np.uint8]:
    """The lowest `rows` bits of a number, lowest first."""
    content = np.frombuffer(bitmap.to_bytes(-(-rows // 8), "little"), dtype=np.uint8)
    return np.unpackbits(content, count=rows, bitorder="little")


def _tally(bitmaps: Iterable[int], rows: int) -> Counts:
    """In how many of the bitmaps each bit is set, int16 [rows].

    Three numbers of one weight become one of that weight (their parity) and one of the next (their majority), until each
    weight has one number: the binary digits of all counts at once.
    """
    counts = np.zeros(rows, dtype=np.int16)
    digits, weight = list(bitmaps), 0
    while digits:
        carries = []
        while len(digits) > 1:
            a, b, c = digits.pop(), digits.pop(), digits.pop() if digits else 0
            odd = a ^ b
            digits.append(odd ^ c)
            if carry := (a & b) | (odd & c):
                carries.append(carry)
        counts += _bits(digits[0], rows).astype(np.int16) << weight
        digits, weight = carries, weight + 1
    return counts
