"""What a query draws at random: its noise, forgotten where it is large and drawn again, and rows that can be drawn again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbox.protocol import Kind, Knob, Query

from .subspaces import Sampler

HELD_BYTES = 2**20
"""Memory of the noise that a search keeps while it waits: 85 rows of 3 x 32 x 32."""


class Noise:
    """Noise u [size,C,H,W] from a stream.

    Many searches wait side by side: large noise is not held until the answer is there, but drawn again from the state of the
    stream in which it was drawn; held it is once some of it was renewed.

    Args:
        generator: the stream from which `sample` draws.
        sample: draws n of them.
        size: how many.
        like: what one of them is as large as, [1,C,H,W].
        fresh: draws those that are renewed, where that may depend on what changed meanwhile, which `sample` must not.
    """

    def __init__(
        self, generator: torch.Generator, sample: Sampler, size: int, like: Tensor, fresh: Sampler | None = None
    ) -> None:
        self._generator, self._sample, self._fresh, self._size = generator, sample, fresh or sample, size
        self._small = size * like.numel() * like.element_size() <= HELD_BYTES
        self._held: Tensor | None = None
        self._state: Tensor | None = None

    def draw(self) -> Tensor:
        """All of it, for the first time."""
        self._state = None if self._small else self._generator.get_state()
        noise = self._sample(self._size)
        self._held = noise if self._small else None
        return noise

    def renew(self, positions: list[int]) -> Tensor:
        """Other noise at these positions."""
        self._held = self.get()
        fresh = self._fresh(len(positions))
        self._held[positions] = fresh
        return fresh

    def get(self) -> Tensor:
        """The noise that was asked last."""
        if self._held is not None:
            return self._held
        assert self._state is not None  # drawn, and not held
        now = self._generator.get_state()
        self._generator.set_state(self._state)
        noise = self._sample(self._size)
        self._generator.set_state(now)
        return noise


@dataclass(slots=True, eq=False)
class Drawn:
    """Rows of a query that can be drawn again one by one, if they are random; `rows` are those that were asked last.

    Args:
        rows: [n,C,H,W].
        draw: draws the row of a position [1,C,H,W]; None where rows are not random.
    """

    rows: Tensor
    draw: Callable[[int], Tensor] | None = None

    def query(self, kind: Kind, knobs: tuple[Knob, ...] = ()) -> Query:
        """The request for these rows."""
        return Query(self.rows, kind, self.redraw if self.draw else None, knobs)

    def redraw(self, positions: list[int]) -> Tensor:
        """Fresh rows [k,C,H,W] for these positions (`Query.redraw`)."""
        assert self.draw is not None
        fresh = torch.cat([self.draw(position) for position in positions])
        self.rows = self.rows.clone()  # the rows that were sent stay as they are
        self.rows[positions] = fresh
        return fresh
