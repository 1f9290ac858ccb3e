"""How many rows to fuse into one forward pass, learnt from the run's own passes and never from made-up rows."""

from __future__ import annotations

from typing import Literal

_FIRST, _LARGEST, _SAMPLES, _GAIN = 32, 4096, 3, 1.05


class BatchSize:
    """The size of the next fused pass: a fixed number, or hill-climbing over powers of two for the most rows a second.

    More is not always faster: a small network on a CPU is often quickest at 32 rows, where its activations fit the cache. A
    size is judged by the fastest of three full passes (other work on the machine only ever slows a pass down), and left for
    its neighbour when that is 5 % faster.
    """

    def __init__(self, max_rows: int | Literal["auto"] = "auto") -> None:
        self.size = _FIRST if max_rows == "auto" else max_rows
        self._best = self.size
        self._settled = max_rows != "auto"
        self._rate: dict[int, float] = {}
        self._samples = 0

    def observe(self, rows: int, seconds: float, multiple: int = 1) -> None:
        """Note that a pass over `rows` rows took `seconds`; one is full when no more rows fit, of which so many go together."""
        if self._settled or rows + multiple <= self.size:
            return
        self._rate[self.size] = max(self._rate.get(self.size, 0.0), rows / max(seconds, 1e-9))
        self._samples += 1
        if self._samples == _SAMPLES:
            self._samples = 0
            self._climb()

    def out_of_memory(self) -> None:
        """Halve the size for good: the device could not hold a pass of the present one."""
        self.size, self._settled = max(1, self.size // 2), True

    def _climb(self) -> None:
        if self._rate[self.size] > _GAIN * self._rate[self._best]:
            self._best = self.size
        untried = [n for n in (2 * self._best, self._best // 2) if 1 <= n <= _LARGEST and n not in self._rate]
        self.size, self._settled = (untried[0], False) if untried else (self._best, True)
