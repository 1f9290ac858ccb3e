"""Randomized features: every query is answered by the network with fresh noise on hidden layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from robustbox.boxes import ModuleBox
from robustbox.errors import InputError
from robustbox.protocol import Answer, BlackBox, Defense

from .layers import Place, find, intercepted
from .row_streams import Distribution, Mode, RowStreams, unit_noise

Scale = Literal["std", "abs"]


@dataclass(frozen=True)
class RandomFeatures(Defense):
    """Nguyen et al. 2024, "Understanding the Robustness of Randomized Feature Defense Against Query-Based Adversarial Attacks".

    h <- h + nu v, v ~ N(0, I), on hidden tensors h of a network that was trained as usual, drawn again for each row of each
    query. Answers far from a decision boundary stay, finite differences drown. It goes into a torch module of this process
    and stands innermost where there are several defenses.

    Args:
        nu: how much noise; 0 is the network itself. `python -m robustbox.defend random-features` finds the largest that costs
            no more than a stated share of accuracy.
        at: one place in the network or several: names of modules (their outputs) or roles (`stage:-1`, `block:*`, `stem`, ...;
            `robustbox.defenses.layers.find` has them all).
        scale: what nu is measured in: `std`, the standard deviation of the row's own values at that place (in place of the
            paper's stored ones, so that one number means the same on every layer and needs no file), or `abs`, as they are.
        distribution: `gauss` or `laplace`, both of standard deviation nu.
        mode: `fresh` noise for each row; `hash`: noise that a secret and the row, with 8 bits a value, decide, so that
            asking it again teaches nothing (an ablation, not the paper's; not stochastic); `frozen`: the same noise for
            ever (for tests).

    Query cost: one row of the model behind it for each row.

    Raises:
        InputError: an option that means nothing; on wrapping, a black box whose layers cannot be reached or found.
    """

    name: ClassVar[str] = "random-features"

    nu: float = 0.3
    at: str | list[str] = "stage:-1"
    scale: Scale = "std"
    distribution: Distribution = "gauss"
    mode: Mode = "fresh"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.nu) and self.nu >= 0):
            raise InputError(f"nu of random-features must be a finite number of at least 0, not {self.nu}")
        if not self.places or not all(isinstance(place, str) and place for place in self.places):
            raise InputError(f"at of random-features must name places in the network, as stage:-1; not {self.at!r}")
        for option, known in (("scale", Scale), ("distribution", Distribution), ("mode", Mode)):
            if (value := getattr(self, option)) not in get_args(known):
                raise InputError(f"{option} of random-features must be {' or '.join(get_args(known))}; not {value!r}")

    @property
    def places(self) -> list[str]:
        """Where the noise is, one or several."""
        return [self.at] if isinstance(self.at, str) else list(self.at)

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box with noise inside; stochastic where the noise is fresh."""
        if not isinstance(box, ModuleBox):
            where = "put it innermost (last) of the defenses" if box.inner is not None else "there it cannot be reached"
            raise InputError(
                f"random-features needs a torch module in this process, and was put on {box.name}: {where}"
            )
        return NoisyFeatures(box, self, seed)


class NoisyFeatures(BlackBox):
    """A torch module behind `RandomFeatures`.

    The module is the user's: hooks stand in it only while a row of this black box is answered, and act in that thread only.
    """

    def __init__(self, inner: ModuleBox, features: RandomFeatures, seed: int) -> None:
        self.inner: BlackBox = inner
        self.name = f"{inner.name} behind {features.name}"
        self.device, self.input_shape, self.stateful = inner.device, inner.input_shape, inner.stateful
        self.classes, self.scores = inner.classes, inner.scores
        self.stochastic = inner.stochastic or (features.mode == "fresh" and features.nu > 0)
        self.places = find(inner.module, features.places)
        self._begin, self._end = Place("", inner.module, "pre"), Place("", inner.module, "post")
        self._features = features
        self._streams = RowStreams(inner.device, features.mode, seed, features.name)

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        """Answer rows float32 [n,C,H,W] in [0, 1], each with noise drawn for it alone.

        Raises:
            InputError: the network does not pass through a place where noise should be.
        """
        if not self._features.nu:
            answer = self.inner.answer(rows, accounts)
        else:
            with self._noise(rows, accounts):
                answer = self.inner.answer(rows, accounts)
        self.classes, self.scores = self.inner.classes, self.inner.scores  # a module without a card shows them by then
        return answer

    def describe(self) -> dict[str, object]:
        """What a result must record: the model behind, and the noise."""
        at = [place.name for place in self.places]
        return {**super().describe(), "options": self._features.options(), "places": at, "inner": self.inner.describe()}

    @contextmanager
    def _noise(self, rows: Tensor, accounts: Tensor) -> Iterator[None]:
        seeds, features, done = self._streams.seeds(rows, accounts), self._features, 0
        places, passed = [self._begin, *self.places, self._end], set()
        streams: list[torch.Generator] = []

        def noisy(k: int, h: Tensor) -> Tensor | None:
            nonlocal streams, done
            passed.add(k)
            if k == 0:  # what the device holds at once: perhaps a part of the rows, perhaps for a second time
                streams = self._streams.begin(seeds[done : done + len(h)])
                return None
            if k == len(places) - 1:
                done, streams = done + len(streams), []
                return None
            n = len(streams)
            if not n or not h.ndim or h.shape[0] % n:
                raise InputError(
                    f"at {places[k].name} the network holds a tensor {list(h.shape)} for {n} rows, not row by row"
                )
            noise = unit_noise(streams, h.numel() // n, h.device, features.distribution).view(h.shape).to(h.dtype)
            if features.scale == "abs":
                return torch.add(h, noise, alpha=features.nu)  # never in place: h may be a residual's too
            spread = spread_of(h, n).mul_(features.nu).to(h.dtype).repeat_interleave(len(h) // n)
            return torch.addcmul(h, noise, spread.view(-1, *[1] * (h.ndim - 1)))

        with intercepted(places, noisy):
            yield
        if self.inner.replayed:  # the network did not run
            return
        for k, place in enumerate(places):
            if k not in passed and len(places) - 1 in passed:  # not where a journal replayed the answer
                raise InputError(f"the network does not pass through {place.name}, so no noise was added there")


def spread_of(h: Tensor, n: int) -> Tensor:
    """The standard deviation of what each of n rows has in a tensor: float32 [n]."""
    values = h.detach().reshape(n, -1).float()
    centred = values - values.mean(dim=1, keepdim=True)  # torch.std takes twenty times as long along a row
    norms: Tensor = torch.linalg.vector_norm(centred, dim=1)
    return norms.div_(values.shape[1] ** 0.5)
