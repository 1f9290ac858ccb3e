"""Blacklight: a query whose fingerprint shares more than half of its hashes with an earlier one is refused.

Li et al. 2022, "Blacklight: Scalable Defense for Neural Networks against Query-Based Black-Box Attacks". A row is salted
and quantised, cut into overlapping windows, each window hashed; the fingerprint is the S largest hashes, a min-hash
sketch of the set of windows:

    v    = (255 x + salt) mod 255,   symbol = round(v / q)               q = 50: six symbols
    h_i  = hash(symbols i to i + W - 1),   i = 0, step, 2 step, ...      floor((L - W + 1) / step) windows
    F(x) = the S largest different h_i
    hit  where |F(x) n F(y)| > T for an earlier y                        S = 50, T = 25

Checked against the authors' code. `hash="sha256"` is theirs, in the order of the reversed hexadecimal digits. The default
`keyed` packs a window's symbols into 63-bit words and mixes them with a secret key: any hash of random order makes a
sketch of the same law, this one is taken of all rows and windows at once.

Deviations, each with its switch: the salt is drawn anew for every scope (theirs is one public constant), windows and
strides follow the size of the image where not given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .gate import Shape, StatefulDefense
from .index import SketchIndex, Tokens
from .memory import IndexedMemory, Memory, Verdict

Layout = Literal["hwc", "chw"]

SMALL = 64
"""Images of fewer pixels along their shorter side have short windows by default."""
_VALUES_AT_ONCE = {"cpu": 2**16}
"""Pixel values hashed at once: what fits a core's cache. Elsewhere `_MANY`."""
_MANY = 2**24


class Secret(NamedTuple):
    """What a scope's fingerprints hang on: the salt, flat [C*H*W] in the order of the windows or [] for none; the key."""

    salt: Tensor
    key: int


@dataclass(frozen=True, kw_only=True)
class Blacklight(StatefulDefense):
    """Blacklight (Li et al. 2022): refuses a query that shares most window hashes with an earlier one.

    Args:
        width: values in a window (W); null: 20 for images below 64 pixels, 50 from there on.
        step: distance between windows; null: 1 for images below 64 pixels, 25 from there on (the paper: 1).
        quantum: grey levels that one symbol covers (q).
        keep: hashes of a fingerprint (S).
        threshold: matching hashes of a hit (T).
        rule: more: more than T hashes must match (the authors' evaluation); least: at least T (the OARS authors').
        layout: order of a row's values: hwc (the authors'; a window spans neighbouring pixels in all channels) or chw (the
            OARS authors').
        salt: added to each value before it is quantised: float (uniform in [0, 255), the authors'), integer (rounded down,
            the OARS authors': noise flips the symbols of 8-bit images at once), none (nothing: survives shifts of the image).
        modulus: what salted values wrap around at: 255 (the authors': white equals black where unsalted) or 256.
        hash: keyed (vectorised) or sha256 (the authors', some ten times slower).
        levels: grey levels that rows are rounded to before they are hashed, as an API of 8-bit images (256) would; null: none.
    """

    name: ClassVar[str] = "blacklight"

    width: int | None = None
    step: int | None = None
    quantum: int = 50
    keep: int = 50
    threshold: int = 25
    rule: Literal["more", "least"] = "more"
    layout: Layout = "hwc"
    salt: Literal["float", "integer", "none"] = "float"
    modulus: Literal[255, 256] = 255
    hash: Literal["keyed", "sha256"] = "keyed"
    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("width", "step", "keep", "threshold"):
            value = getattr(self, option)
            self.require(value is None or value >= 1, f"{option} must be at least 1, not {value}")
        self.require(1 <= self.quantum <= 255, f"quantum must be between 1 and 255, not {self.quantum}")
        self.require(self.levels is None or self.levels >= 2, f"levels must be at least 2, not {self.levels}")
        self.require(
            self.threshold <= self.keep, f"threshold must be at most keep, not {self.threshold} of {self.keep}"
        )

    def check_shape(self, shape: Shape) -> None:
        width, step = self.windows(shape)
        windows = (math.prod(shape) - width + 1) // step
        self.require(windows >= 1, f"an image of {math.prod(shape)} values has no window of {width}: set width")

    def windows(self, shape: Shape) -> tuple[int, int]:
        """Width of and distance between the windows of rows (C, H, W)."""
        small = min(shape[1:]) < SMALL
        return self.width or (20 if small else 50), self.step or (1 if small else 25)

    def secret(self, shape: Shape, generator: torch.Generator) -> Secret:
        """Salt [C*H*W] float32 and a 63-bit key."""
        key = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
        if self.salt == "none":
            return Secret(torch.empty(0, device=generator.device), key)
        salt = torch.rand(math.prod(shape), generator=generator, device=generator.device) * 255
        return Secret(salt.floor() if self.salt == "integer" else salt, key)

    def prints(self, rows: Tensor, secrets: Sequence[Secret]) -> list[Tokens]:
        """The sketch of each row: at most S different hashes, int64, descending."""
        width, step = self.windows((rows.shape[1], rows.shape[2], rows.shape[3]))
        found: list[Tokens] = []
        for part in parts(rows):
            symbols = self.symbols(rows[part], [secret.salt for secret in secrets[part]])
            if self.hash == "sha256":
                found += (sha256_sketch(row, width, step, self.quantum, self.keep) for row in symbols.cpu().numpy())
            else:
                keys = torch.tensor([secret.key for secret in secrets[part]], device=rows.device)
                found += sketches(window_hashes(symbols, keys, width, step, self._bits), self.keep)
        return found

    def symbols(self, rows: Tensor, salts: Sequence[Tensor]) -> Tensor:
        """The quantised values of rows [n,C,H,W] under n salts, int32 [n,C*H*W]."""
        return quantised(flat(rows, self.layout, self.levels), salts, self.quantum, self.modulus)

    @property
    def _bits(self) -> int:
        return symbol_bits(self.quantum, self.modulus)

    def memory(self, secret: Secret) -> Memory:
        return SketchMemory(self.threshold + (self.rule == "more"))


class SketchMemory(IndexedMemory):
    """Sketches; a hit is a query that shares at least `least` tokens with a stored one."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._index: SketchIndex = SketchIndex()

    def judge(self, print: Tokens) -> Verdict:
        matches, row = self._index.best(print, self._least)
        return Verdict(matches >= self._least, row, matches)


def parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that are hashed at once."""
    at_once = max(1, _VALUES_AT_ONCE.get(rows.device.type, _MANY) // rows[0].numel())
    for start in range(0, len(rows), at_once):
        yield slice(start, start + at_once)


def flat(rows: Tensor, layout: Layout, levels: int | None) -> Tensor:
    """The values of rows [n,C,H,W] in the order of the windows, in [0, 1] and rounded to grey levels: a copy [n,C*H*W]."""
    ordered = rows.permute(0, 2, 3, 1) if layout == "hwc" else rows
    values = ordered.clone(memory_format=torch.contiguous_format).view(len(rows), -1).clamp_(0, 1)
    return values if levels is None else values.mul_(levels - 1).round_().div_(levels - 1)


def quantised(values: Tensor, salts: Sequence[Tensor], quantum: int, modulus: int) -> Tensor:
    """round(((255 v + salt) mod m) / q) of values [n,L] in [0, 1], which it uses up, under n salts [L], [1] or []: int32."""
    values.mul_(255)
    if salts[0].numel():
        one = all(salt is salts[0] for salt in salts)
        values.add_(salts[0] if one else torch.stack(list(salts)))
    # Salts are below m: one subtraction is the remainder, and exact. Every step rounds element by element.
    values.sub_(torch.ge(values, modulus, out=torch.empty_like(values)), alpha=modulus)
    return values.div_(quantum).round_().to(torch.int32)


def symbol_bits(quantum: int, modulus: int) -> int:
    """Bits that hold a symbol."""
    return max(1, round(modulus / quantum).bit_length())


def window_hashes(symbols: Tensor, keys: Tensor, width: int, step: int, bits: int) -> Tensor:
    """Keyed hashes of the windows of symbols int32 [n,L] below 2^bits: int64 [n,windows].

    Symbols are packed, first five at a time along the row, then strided into words of at most 63 bits; words are mixed one
    after the other. A window of one word (W <= 21 of three bits) cannot collide with another.
    """
    group = max(size for size in (1, 2, 3, 4, 5) if width % size == 0 and size * bits < 32)
    windows = (symbols.shape[1] - width + 1) // step
    stride = math.gcd(group, step)  # no group starts anywhere else
    starts = (symbols.shape[1] - group) // stride + 1
    packed = symbols[:, ::stride][:, :starts].clone()
    for k in range(1, group):
        packed.bitwise_or_(symbols[:, k::stride][:, :starts] << (bits * k))
    groups, a_word = width // group, 63 // (group * bits)
    hashes = keys[:, None]
    for first in range(0, groups, a_word):
        word = torch.zeros(len(symbols), windows, dtype=torch.long, device=symbols.device)
        for k in range(first, min(first + a_word, groups)):
            strided = packed[:, k * group // stride :: step // stride][:, :windows].long()
            word |= strided << (group * bits * (k - first))
        hashes = mix(word.bitwise_xor_(hashes))
    return hashes


def mix(words: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of int64 that looks random; in place."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return words.bitwise_xor_((words >> 31).bitwise_and_((1 << 33) - 1))


def sketches(hashes: Tensor, keep: int) -> list[Tokens]:
    """The `keep` largest different hashes of each row of int64 [n,windows], descending; fewer where there are no more."""
    windows = hashes.shape[1]
    some = min(4 * keep, windows)  # repeated windows leave fewer different ones
    tops = [_different(row, keep) for row in _largest(hashes, some)]
    if some < windows:
        short = [k for k, top in enumerate(tops) if len(top) < keep]
        for k, row in zip(short, _largest(hashes[short], windows), strict=True):
            tops[k] = _different(row, keep)
    return tops


def _largest(hashes: Tensor, count: int) -> NDArray[np.int64]:
    """The `count` largest of each row, descending, on the host."""
    if hashes.device.type != "cpu":
        return hashes.topk(count, dim=1).values.cpu().numpy()
    host = hashes.numpy()
    top = host if count == host.shape[1] else np.partition(host, host.shape[1] - count, axis=1)[:, -count:]
    return np.sort(top, axis=1)[:, ::-1]  # numpy's selection is several times faster than torch's


def _different(descending: NDArray[np.int64], keep: int) -> Tokens:
    """The first `keep` different ones."""
    return descending[np.flatnonzero(np.diff(descending, prepend=descending[0] + 1))[:keep]]


def sha256_sketch(symbols: NDArray[np.int32], width: int, step: int, quantum: int, keep: int) -> Tokens:
    """The authors' sketch of one row of symbols [L]: digests by their reversed digits, of which the first 64 bits are kept."""
    values = (symbols * quantum).astype("<i2").tobytes()
    windows = range(0, (len(symbols) - width + 1) // step * step, step)
    digests = {hashlib.sha256(values[2 * i : 2 * (i + width)]).hexdigest()[::-1] for i in windows}
    largest = sorted(digests, reverse=True)[:keep]
    return np.array([int(digits[:16], 16) - 2**63 for digits in largest], dtype=np.int64)
