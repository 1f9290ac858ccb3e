"""ZO-AE-DS as it is deployed: a model behind a denoiser and an auto-encoder that were trained for it by queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from robustbox.errors import InputError
from robustbox.protocol import BlackBox, Defense

from .transforms import Transformed
from .zo_networks import Guard


@dataclass(frozen=True, eq=False)
class ZOAEDS(Defense):
    """Zhang et al., ICLR 2022, "How to Robustify Black-Box ML Models? A Zeroth-Order Optimization Perspective".

    A row x is answered by f(Dec(Enc(D(x)))); without an auto-encoder (the variant `ds`) by f(D(x)), which may leave [0, 1].
    That is the base classifier to which noise belongs: `python -m robustbox.certify --defense FILE` certifies it, and
    `--defense "[smoothing, FILE]"` answers by its vote under noise. The networks come from a file that
    `python -m robustbox.defend zo-ae-ds` trains and writes.

    Args:
        sigma: standard deviation of the noise that it was trained for; for the record.

    Query cost: one row of the model behind it for each row.
    """

    name: ClassVar[str] = "zo-ae-ds"

    sigma: float = 0.25
    guard: Guard | None = field(default=None, init=False, repr=False)
    layout: Mapping[str, Any] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, guard: Guard, layout: Mapping[str, Any], sigma: float) -> Self:
        """The defense of trained networks; `layout` holds the arguments from which `Guard` builds them."""
        defense = cls(sigma)
        object.__setattr__(defense, "guard", guard.eval().requires_grad_(False))
        object.__setattr__(defense, "layout", dict(layout))
        return defense

    def options(self) -> dict[str, object]:
        """The noise, the networks' layout and the hash of their weights."""
        plain: dict[str, object] = {"sigma": self.sigma}
        if self.guard is not None:
            plain |= {"layout": dict(self.layout), "weights": self.guard.hashed()}
        return plain

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the networks."""
        return {} if self.guard is None else dict(self.guard.state_dict())

    @classmethod
    def from_tensors(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The defense of a file."""
        with torch.random.fork_rng(devices=[]):
            guard = Guard(**options["layout"])
        guard.load_state_dict(dict(tensors))
        if guard.hashed() != options["weights"]:
            raise RuntimeError("its weights are not those that were written")
        return cls.of(guard, options["layout"], options["sigma"])

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        """The black box behind the networks.

        Raises:
            InputError: there are no networks, or none for this black box.
        """
        if self.guard is None:
            raise InputError(
                f"{self.name} must be trained for a model: python -m robustbox.defend {self.name} writes a file, which "
                "--defense takes instead of the name"
            )
        channels = self.layout["channels"]
        if box.input_shape is not None and box.input_shape[0] != channels:
            raise InputError(
                f"this {self.name} was trained for {channels} channels, {box.name} has {box.input_shape[0]}"
            )
        return Guarded(box, self.guard.to(box.device), self)


class Guarded(Transformed):
    """A black box that sees rows only through the networks."""

    def __init__(self, inner: BlackBox, guard: Guard, recipe: ZOAEDS) -> None:
        super().__init__(inner, recipe)
        self._guard = guard

    @torch.no_grad()
    def transform(self, rows: Tensor) -> Tensor:
        """What the networks make of rows [n,C,H,W]."""
        made: Tensor = self._guard(rows)
        return made
