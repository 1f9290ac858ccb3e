"""Gradients from function values alone: random, coordinate-wise and two-point estimates, batched over samples.

A loss is a function of points [B,c,d] (c points for each of B samples) to values float64 [B,c]. An estimate is [B,d]; that of
a sample depends on its own values only. Each estimator states its rows (values asked) a sample. Constants are exact: where
the loss is linear with gradient g, every estimate's mean is g, and

    RGE, TwoPoint (sphere):   E |e - g|^2 / |g|^2 = (d - 1) / q,   E cos(e, g) about sqrt(q / (q + d - 1))
    CGE:                      e = g
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.errors import InputError

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GradientEstimator(ABC):
    """Estimates the gradients of a loss at B points [B,d].

    Args:
        mu: the step of the differences.
        chunk: directions asked at once, to bound memory; None is all.
    """

    name: ClassVar[str]

    mu: float = 0.005
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mu < math.inf:
            raise InputError(f"mu of {self.name} must be a positive number, not {self.mu}")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk of {self.name} must be at least 1, not {self.chunk}")

    @abstractmethod
    def rows(self, d: int) -> int:
        """Values asked a sample of d dimensions."""

    @abstractmethod
    def estimate(self, loss: Loss, z: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """The estimates [B,d], and the share of differences that were exactly 0 (which scores that are rounded cause)."""

    def _chunks(self, n: int) -> list[int]:
        size = self.chunk or n
        return [min(size, n - start) for start in range(0, n, size)]


@dataclass(frozen=True)
class RGE(GradientEstimator):
    """Random directions, forward: (d / q mu) sum_i [loss(z + mu u_i) - loss(z)] u_i, u_i uniform on the unit sphere.

    Directions are independent for each sample and each i. Rows: q + 1.

    Args:
        q: directions a sample.
    """

    name: ClassVar[str] = "rge"

    q: int = 192

    def rows(self, d: int) -> int:
        """q + 1."""
        return self.q + 1

    def estimate(self, loss: Loss, z: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """The estimates, and the share of zero differences."""
        (n, d), total, flat = z.shape, torch.zeros_like(z, dtype=torch.float64), 0.0
        base = loss(z[:, None])
        for count in self._chunks(self.q):
            u = unit(n, count, d, z, generator)
            difference = loss(z[:, None] + self.mu * u) - base
            total += torch.einsum("bc,bcd->bd", difference, u.double())
            flat += float((difference == 0).double().mean()) * count / self.q
        return (total * (d / (self.q * self.mu))).to(z.dtype), flat


@dataclass(frozen=True)
class CGE(GradientEstimator):
    """Every coordinate: central [loss(z + mu e_k) - loss(z - mu e_k)] / 2 mu, or forward [loss(z + mu e_k) - loss(z)] / mu.

    Rows: 2 d central, d + 1 forward.

    Args:
        central: differences to both sides.
    """

    name: ClassVar[str] = "cge"

    central: bool = True

    def rows(self, d: int) -> int:
        """2 d central, d + 1 forward."""
        return 2 * d if self.central else d + 1

    def estimate(self, loss: Loss, z: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """The estimates, and the share of zero differences."""
        d = z.shape[1]
        found, base = [], None if self.central else loss(z[:, None])
        steps = self.mu * torch.eye(d, dtype=z.dtype, device=z.device)
        for part in steps.split(self.chunk or d):
            up = loss(z[:, None] + part)
            found.append(up - (loss(z[:, None] - part) if base is None else base))
        difference = torch.cat(found, dim=1)
        estimate = difference / (2 * self.mu if self.central else self.mu)
        return estimate.to(z.dtype), float((difference == 0).double().mean())


@dataclass(frozen=True)
class TwoPoint(GradientEstimator):
    """Antithetic pairs (Ren, Tang, Li, ICML 2023): (1/m) sum_i [loss(z + mu Z_i) - loss(z - mu Z_i)] / (2 mu) Z_i, and a kick.

    Z is N(0, I), or sqrt(d) times uniform on the unit sphere: the mean of Z Z^T is I for both. The kick N(0, r^2 / d I) is
    added to every estimate; where the loss is even around z all differences are 0 and nothing else leaves the saddle.
    Rows: 2 m.

    Args:
        m: pairs a sample.
        directions: how Z is drawn.
        kick: the norm r of the kick (its root mean square).
    """

    name: ClassVar[str] = "two-point"

    m: int = 96
    directions: Literal["gauss", "sphere"] = "sphere"
    kick: float = 0.0

    def rows(self, d: int) -> int:
        """2 m."""
        return 2 * self.m

    def estimate(self, loss: Loss, z: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """The estimates, and the share of zero differences."""
        (n, d), total, flat = z.shape, torch.zeros_like(z, dtype=torch.float64), 0.0
        for count in self._chunks(self.m):
            if self.directions == "sphere":
                Z = unit(n, count, d, z, generator) * math.sqrt(d)
            else:
                Z = torch.randn(n, count, d, dtype=z.dtype, device=z.device, generator=generator)
            difference = loss(z[:, None] + self.mu * Z) - loss(z[:, None] - self.mu * Z)
            total += torch.einsum("bc,bcd->bd", difference, Z.double())
            flat += float((difference == 0).double().mean()) * count / self.m
        estimate = total / (2 * self.mu * self.m)
        if self.kick:
            noise = torch.randn(n, d, dtype=z.dtype, device=z.device, generator=generator)
            estimate += self.kick / math.sqrt(d) * noise.double()
        return estimate.to(z.dtype), flat


def unit(n: int, count: int, d: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Directions [n,count,d], each uniform on the unit sphere."""
    u = torch.randn(n, count, d, dtype=like.dtype, device=like.device, generator=generator)
    return torch.nn.functional.normalize(u, dim=2)
