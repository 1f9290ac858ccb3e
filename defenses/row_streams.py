"""A random stream for each row, for defenses that draw: it depends on the account and its rows so far, never on neighbours."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.identity import derive_seed

Mode = Literal["fresh", "frozen", "hash"]
MODES: tuple[Mode, ...] = get_args(Mode)
Distribution = Literal["gauss", "laplace"]


class RowStreams:
    """Opens one generator a row, seeded by (identity, account, number of the row among the account's).

    So the n-th row of an account is answered alike alone and in company, and however rows are fused into passes; nothing
    is kept of an account but how many rows it sent. Safe for several threads.

    Args:
        device: where the generators draw.
        mode: `fresh`, as above; `frozen`, the same stream for every row; `hash`, a stream that a secret and the row decide,
            with 8 bits a value, so that a row that comes again, or one that no picture tells from it, is answered as before.
        identity: what the streams are for, a seed among it.

    Raises:
        InputError: no such mode.
    """

    def __init__(self, device: torch.device, mode: Mode, *identity: object) -> None:
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}; not {mode!r}")
        self._device, self._mode, self._identity = device, mode, identity
        self._root = derive_seed(*identity)
        self._sent: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._pool = threading.local()

    def open(self, rows: Tensor, accounts: Tensor) -> list[torch.Generator]:
        """The streams of rows [n,C,H,W] that accounts [n] send, at their beginnings; the next call takes them back."""
        return self.begin(self.seeds(rows, accounts))

    def begin(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """The streams of these seeds, at their beginnings; the next call takes them back."""
        generators: list[torch.Generator] = self._pool.__dict__.setdefault("generators", [])
        while len(generators) < len(seeds):
            generators.append(torch.Generator(self._device))
        opened = generators[: len(seeds)]
        for generator, seed in zip(opened, seeds, strict=True):
            generator.manual_seed(seed)
        return opened

    def seeds(self, rows: Tensor, accounts: Tensor) -> list[int]:
        """What the streams of rows [n,C,H,W] that accounts [n] send begin with; each row is counted."""
        if self._mode == "frozen":
            return [self._root] * len(rows)
        if self._mode == "hash":
            key = self._root.to_bytes(8, "little")
            pictures = rows.detach().mul(255).round_().clamp_(0, 255).to("cpu", torch.uint8).contiguous()
            contents = (picture.numpy().data for picture in pictures)
            digests = (hashlib.blake2b(content, digest_size=8, key=key).digest() for content in contents)
            return [int.from_bytes(digest, "little") >> 1 for digest in digests]
        with self._lock:
            seeds = []
            for account in accounts.tolist():
                seeds.append(derive_seed(self._root, account, self._sent[account]))
                self._sent[account] += 1
        return seeds


def unit_noise(
    streams: list[torch.Generator], size: int, device: torch.device, distribution: Distribution = "gauss"
) -> Tensor:
    """Noise of mean 0 and standard deviation 1, float32 [n, size]: each row from its own stream."""
    noise = torch.empty(len(streams), size, device=device)
    for row, generator in zip(noise, streams, strict=True):  # a row alone and among others takes the same numbers
        row.normal_(generator=generator) if distribution == "gauss" else row.uniform_(generator=generator)
    if distribution == "gauss":
        return noise
    u = noise.sub_(0.5)  # by the inverse of the distribution function; u = -0.5 would be infinite
    return -u.sign() * torch.log1p(-2 * u.abs().clamp_max_(0.5 - 2**-25)) / 2**0.5
