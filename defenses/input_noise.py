"""Input noise: every query is answered for the row plus fresh Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.identity import stream
from robustbox.protocol import Answer, BlackBox, Defense

from .transforms import Outer
from .unanswered import Unanswered


@dataclass(frozen=True)
class InputNoise(Defense):
    """RND (Qin et al. 2021, "Random Noise Defense Against Query-Based Black-Box Attacks"): f(x + sigma v), v ~ N(0, I).

    Two queries of one row differ, so that an attack's finite differences drown where its own steps are small beside
    sigma. The noisy row may leave [0, 1]: the paper does not clip it, and neither does this unless `clip` is set (for a
    model that refuses such rows). The paper's fine-tuning of the model under noise is the model's business.

    Args:
        sigma: standard deviation of the noise, in the units of the image (the paper's nu).
        clip: whether the noisy row is clipped to [0, 1].

    Query cost: one row of the model behind it for each row.

    Raises:
        InputError: sigma is negative or not finite.
    """

    name: ClassVar[str] = "input-noise"

    sigma: float = 0.02
    clip: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise InputError(f"sigma of input-noise must be a finite number of at least 0, not {self.sigma}")

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind fresh noise; stochastic, whatever `box` is."""
        return NoisyInputs(box, self, seed)


class NoisyInputs(Outer):
    """A black box behind `InputNoise`.

    Each account draws from a stream of its own, seeded by (seed, account), row after row: what it is answered depends
    neither on its neighbours nor on how rows are fused into passes. A generator takes 2.7 kB, and many accounts send one row
    only (the evaluator's): a generator is kept from the second row on, for which the first row's noise is drawn again.

    Noise of rows to which the model failed to give answers is that of their accounts' next rows: where these are the same rows
    again, a gate behind sees nothing new.
    """

    def __init__(self, inner: BlackBox, noise: InputNoise, seed: int) -> None:
        super().__init__(inner, noise)
        self.stochastic, self.levels = True, None
        self._noise, self._seed = noise, seed
        self._streams: dict[int, torch.Generator | int] = {}  # a number: how many values an account's only row took
        self._unheard = Unanswered[Tensor]()

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1], each with noise drawn for it alone."""
        senders = accounts.tolist()
        noise = self._drawn(rows, senders)
        try:
            noisy = torch.add(rows, noise, alpha=self._noise.sigma)
            return self._show(noisy.clamp_(0, 1) if self._noise.clip else noisy, accounts)
        except BaseException:
            self._unheard.keep(senders, [*noise])
            raise

    def _drawn(self, rows: Tensor, accounts: list[int]) -> Tensor:
        """Unit noise like rows [n,C,H,W]."""
        noise = torch.empty_like(rows)
        # A draw for each row: one draw of n rows takes other numbers from a generator than n draws of one.
        for row, account in zip(noise, accounts, strict=True):
            known = self._unheard.take(account)
            if known is None:
                self._draw(row, account)
            else:
                row.copy_(known)
        return noise

    def _draw(self, row: Tensor, account: int) -> None:
        """Fill a row [C,H,W] with the next values of an account's stream."""
        known = self._streams.get(account)
        if isinstance(known, torch.Generator):
            row.normal_(generator=known)
            return
        generator = stream(self.device, self._seed, "input-noise", account)
        if known is not None:
            row.new_empty(known).normal_(generator=generator)
        row.normal_(generator=generator)
        # Where its values lie in another order in memory, a row takes other numbers: only the generator knows which.
        first = known is None and row.is_contiguous()
        self._streams[account] = row.numel() if first else generator
