"""Where a boundary's normal is to be expected, what was learnt about it, and which noise asks for it best.

Normals n are unit vectors, their coefficients n_i in an orthonormal basis (`blocks.py`) independent with variance c_i, sum 1:

    c_i ~ 0.3 [a colour, not grey] / (1 + (f_i / 40)^2) exp(-a_i) l_colour l_band l_cell

for f_i cycles an image and a squared distance a_i from its middle (1 at a border). The factors l of colours, of frequency bands
and of the 16 cells of the image are learnt, from 1 on.

The sign of <n, u> under noise u with variances s_i has E[sign u_i] = k s_i n_i / tau, k^2 = 2 / pi, tau^2 = sum s_i n_i^2.
So q signs tell of n_i what a measurement with noise of variance 1 / I_i does, I_i = k^2 q s_i / tau^2, and n_i is known to the
share c_i I_i / (1 + c_i I_i). What is known in all, sum c_i^2 I_i / (1 + c_i I_i), is largest, for q' = 2 q / pi, where

    s_i = (sqrt(c_i) / t - 1)+ / c_i     with t such that     sum (sqrt(c_i) / t - 1)+ = q',

water-filling: few queries go to the few coefficients that vary most, many flow into all. `cos ~ sqrt(rho q' / (q' + d))`, for d
coefficients alike that hold the share rho of the normal, is its simplest case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import blocks

COLOUR, CYCLES = 0.3, 40.0
"""The cautious prior: how much less a colour varies than grey, and where the frequencies begin to fade."""
BANDS = 5
TRUST = 4.0
"""Precision of the belief that the logarithm of a factor is 0."""
K = math.sqrt(2 / math.pi)


def water_filling(variances: Tensor, queries: float) -> Tensor:
    """The noise's variances s for a normal's variances c > 0 of any shape, whose queries are to be shared out; mean 1."""
    root = variances.sqrt()
    total = root.flatten().sort(descending=True).values.cumsum(0)
    level = (total / (queries + torch.arange(1, len(total) + 1, device=total.device))).max()
    noise = (root / level - 1).clamp_min_(0).div_(variances)
    return noise / noise.mean()


class Evidence:
    """What the signs at one image told of a normal: `told` = sum of measurements times precision, [C,H,W].

    Attributes:
        precision: of those measurements, [C,H,W].
        spread: the variance of `told` that is noise, [C,H,W].
    """

    def __init__(self, like: Tensor) -> None:
        self.told, self.precision, self.spread = (torch.zeros_like(like) for _ in range(3))

    def fade(self, share: float) -> None:
        """Keep a share of the evidence: the boundary turned."""
        self.told *= share
        self.precision *= share
        self.spread *= share * share

    def add(self, total: Tensor, count: int, noise: Tensor, residual: Tensor) -> None:
        """Add `count` signs: sum_j s_j u_j [C,H,W] under noise of variances s [C,H,W]; `residual` is tau^2."""
        gained = noise * (K * K * count / residual)
        self.told += total * (K / residual.sqrt())
        self.precision += gained
        self.spread += gained

    def variances(self, prior: Tensor) -> Tensor:
        """What is not known of each coefficient, [C,H,W]."""
        return 1 / (1 / prior + self.precision)

    def mean(self, prior: Tensor) -> Tensor:
        """The expected normal, shrunk where little was asked, [C,H,W]."""
        return self.told * self.variances(prior)

    def rule_out(self, tangent: Tensor, prior: Tensor) -> None:
        """Take in that the normal has no part along a direction [C,H,W]."""
        rest = self.variances(prior)
        mean = self.told * rest
        share = (mean * tangent).sum() / (tangent.square() * rest).sum().clamp_min(1e-30)
        self.told = (mean - share * rest * tangent) / rest


class Spectrum:
    """The variances of normals, learnt from the answers at one image, or at all images of a run.

    The answers of an iteration are taken in once, as they came. (Kept evidence would say of the coefficients that were asked
    most that they hardly vary: what was known of them lies along the ray by then, along which no noise is sent.) The signs' sum
    at a coefficient has the variance q s_i (1 + c_i I_i). What the same signs give in other orders, q s_i, is measured and
    subtracted: clipping to the box takes its share of the noise.

    Args:
        like: an image [C,H,W].
    """

    def __init__(self, like: Tensor) -> None:
        channels, height, width = shape = (*like.shape,)
        device = like.device
        self.basis = basis = blocks(shape, device)
        grey = torch.full((channels, 1, 1), COLOUR, device=device)
        grey[0] = 1
        self._base = grey / (1 + (basis.cycles / CYCLES).square()) * torch.exp(-basis.away)
        band = (
            (basis.cycles * (BANDS / float(basis.cycles.max()) * 0.999)).long()
            if height * width > 1
            else basis.cell * 0
        )
        colour = torch.arange(channels, device=device).view(-1, 1, 1).expand(shape)
        groups = (colour, band.expand(shape), basis.cell.expand(shape))
        self._groups = [(group.flatten(), int(group.max()) + 1) for group in groups]
        self._logs = [torch.zeros(size, device=device) for _, size in self._groups]
        self._precision = [torch.full_like(log, TRUST) for log in self._logs]
        self._shape = shape

    def variances(self) -> Tensor:
        """The prior variances c [C,H,W]; their sum is 1."""
        factor = torch.zeros(self._base.shape, device=self._base.device)
        for log, (group, _) in zip(self._logs, self._groups, strict=True):
            factor += log[group].view(self._shape)
        c = self._base * factor.exp_()
        return c / c.sum()

    def learn(self, total: Tensor, shuffled: Tensor, count: float, noise: Tensor) -> None:
        """Take in the answers of an iteration: a step of Fisher scoring on the logarithms of the factors.

        What all factors have in common is left out: the normal's length is known.

        Args:
            total: the sum of signs times noise, [C,H,W].
            shuffled: that of the same signs in k other orders, [k,C,H,W].
            count: how many answers they are worth.
            noise: the noise's variances, [C,H,W].
        """
        c = self.variances()
        nothing, (cell, cells) = shuffled.square().mean(0), self._groups[-1]
        there, asked = (c.new_zeros(cells).index_add_(0, cell, x.flatten()) for x in (nothing, noise * count))
        noise = noise * (there / asked.clamp_min(1e-9))[cell].view(self._shape)  # what clipping left of it
        signal = noise * c * (K * K * count / (noise * c).sum())
        excess = (total.square() - nothing) / (noise * count).clamp_min(1e-9)
        weight = torch.where(noise > 0, signal / (2 * (1 + signal).square()), 0.0) / (1 + 1 / len(shuffled))
        score, information = weight * (excess - signal), weight * signal
        score = score - score.sum() / information.sum().clamp_min(1e-9) * information
        for k, (group, size) in enumerate(self._groups):
            if size == 1:
                continue
            slope, own = (
                torch.zeros(size, device=c.device).index_add_(0, group, x.flatten()) for x in (score, information)
            )
            self._precision[k] += own
            self._logs[k] = (self._logs[k] + (slope / self._precision[k]).clamp_(-0.5, 0.5)).clamp_(-3, 3)
