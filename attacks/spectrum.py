"""Where a boundary's normal is to be expected, what was learnt about it, and which noise asks for it best.

Normals n are unit vectors, their coefficients n_i in an orthonormal basis (`blocks.py`) independent with variance c_i, sum 1:

    c_i ~ exp(-1.5 a_i) l_band l_cell                                        grey
    c_i ~ exp(-1.5 a_i) l_band l_cell 1.2 / (1 + (f_i / (0.12 side))^2)      colours

for f_i cycles an image, a squared distance a_i from its middle (1 at a border) and images of `side` pixels: as for the eye,
colours count where waves are long, and grey at all lengths alike. The factors l of frequency bands, apart for
each colour, and of the 16 cells of the image are learnt, from 1 on.

What is known of an image alone is its perturbation v = x_b - x at a boundary point: at the nearest point it is parallel to the
normal, and long before it lies where normals lie. So c_i is multiplied by a power of the product of three ratios,

    (e / c + 0.5) / 1.5     of the energy e of v / |v| to c with all l = 1: in the coefficient, in its band, in its cell.

The sign of <n, u> under noise u with variances s_i has E[sign u_i] = k s_i n_i / tau, k^2 = 2 / pi, tau^2 = sum s_i n_i^2.
So q signs tell of n_i what a measurement with noise of variance 1 / I_i does, I_i = k^2 q s_i / tau^2, and n_i is known to the
share c_i I_i / (1 + c_i I_i). What is known in all, sum c_i^2 I_i / (1 + c_i I_i), is largest, for q' = 2 q / pi, where

    s_i = (sqrt(c_i) / t - 1)+ / c_i     with t such that     sum (sqrt(c_i) / t - 1)+ = q',

water-filling: few queries go to the few coefficients that vary most, many flow into all. `cos ~ sqrt(rho q' / (q' + d))`, for d
coefficients alike that hold the share rho of the normal, is its simplest case.

Blocks are too short to tell the frequencies of a texture apart. So an estimate is filtered by the spectrum of v over the whole
image (`filtered_like`), to a small power: most of v is noise of former estimates, and to the power 1/2 it would grow from one
iteration to the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import blocks

COLOUR, COARSE, MIDDLE = 1.2, 0.12, 1.5
"""The cautious prior: how much more a colour varies than grey at low frequencies; where colours begin to fade (cycles a pixel);
and how fast all does away from the middle."""
BANDS = 5
SHUFFLES = 4
"""How often signs are shuffled among their rows, to hear what tells nothing."""
FLOOR = 0.5
"""What is added to the ratio of a perturbation's energy to the prior's, so that no coefficient is given up."""
TRUST = 2.0
"""Precision of the belief that the logarithm of a factor is 0."""
LAGS = 4.5
"""Pixels up to which a perturbation's pixels are held to be correlated (a standard deviation)."""
POWER, REST = 0.25, 0.1
"""The power of its spectrum that estimates are filtered by, and what is added to the spectrum, over its mean."""
K = math.sqrt(2 / math.pi)


def water_filling(variances: Tensor, queries: float) -> Tensor:
    """The noise's variances s for a normal's variances c > 0 of any shape, whose queries are to be shared out; mean 1."""
    root = variances.sqrt()
    total = root.flatten().sort(descending=True).values.cumsum(0)
    level = (total / (queries + torch.arange(1, len(total) + 1, device=total.device))).max()
    noise = (root / level - 1).clamp_min_(0).div_(variances)
    return noise / noise.mean()


def summed(groups: tuple[Tensor, int], *values: Tensor) -> list[Tensor]:
    """Sums of values [C,H,W] over groups: the number of each coefficient's group [C H W], and how many there are."""
    group, size = groups
    return [each.new_zeros(size).index_add_(0, group, each.flatten()) for each in values]


def filtered_like(estimate: Tensor, perturbation: Tensor) -> Tensor:
    """An estimate of a normal [1,C,H,W], filtered by the power spectrum of a perturbation [1,C,H,W] that is not 0.

    The spectrum is that of all channels together, smoothed to what pixels a few apart have in common.
    """
    size = perturbation.shape[-2:]
    shared = torch.fft.irfft2(torch.fft.rfft2(perturbation).abs().square().mean(1), s=size)
    down, right = (torch.fft.fftfreq(n, 1 / n, device=perturbation.device) for n in size)
    near = torch.exp((down.square()[:, None] + right.square()) / (-2 * LAGS**2))
    spectrum = torch.fft.rfft2(shared / shared[..., :1, :1] * near).real.clamp_min(0)
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(estimate) * (spectrum + REST).pow(POWER), s=size)
    return filtered


class Evidence:
    """What the signs at one image told of a normal: `told` = sum of measurements times precision, [C,H,W].

    Attributes:
        precision: of those measurements, [C,H,W].
        spread: the variance of `told` that is noise, [C,H,W].
        heard: `told` before anything was ruled out; after it, what the same signs would have told in other orders, [1+k,C,H,W].
    """

    def __init__(self, like: Tensor) -> None:
        self.told, self.precision, self.spread = (torch.zeros_like(like) for _ in range(3))
        self.heard = like.new_zeros(1 + SHUFFLES, *like.shape)

    def fade(self, share: float) -> None:
        """Keep a share of the evidence: the boundary turned."""
        self.told *= share
        self.precision *= share
        self.spread *= share * share
        self.heard *= share

    def add(self, sums: Tensor, count: float, noise: Tensor, residual: Tensor) -> None:
        """Add `count` signs under noise of variances s [C,H,W]; `residual` is tau^2.

        Args:
            sums: sum_j s_j u_j, and that of the same signs in k other orders, [1+k,C,H,W].
        """
        gained, sums = noise * (K * K * count / residual), sums * (K / residual.sqrt())
        self.told += sums[0]
        self.precision += gained
        self.spread += gained
        self.heard += sums

    def variances(self, prior: Tensor) -> Tensor:
        """What is not known of each coefficient, [C,H,W]."""
        return 1 / (1 / prior + self.precision)

    def mean(self, prior: Tensor) -> Tensor:
        """The expected normal, shrunk where little was asked, [C,H,W]."""
        return self.told * self.variances(prior)

    def rule_out(self, chord: Tensor, prior: Tensor) -> None:
        """Take in that the normal has no part along a direction [C,H,W]."""
        rest = self.variances(prior)
        mean = self.told * rest
        share = (mean * chord).sum() / (chord.square() * rest).sum().clamp_min(1e-30)
        self.told = (mean - share * rest * chord) / rest


class Spectrum:
    """The variances of normals, learnt from the evidence of one image, or of all images of a run.

    Each update is a step of Fisher scoring on the logarithms of the factors. What was heard of a coefficient has the variance
    V_i + c_i I_i^2 with the noise V_i of the evidence. It is taken as it was heard: what arcs rule out lies along the estimate,
    and without it those coefficients would seem to vary least that were asked most. The noise is measured by the signs in other
    orders, since clipping to the box takes its share of it. What all groups have in common is left out (the normal's length is
    known), and an image moves a factor by its own share of the information.

    Args:
        like: an image [C,H,W].

    Attributes:
        basis: that of the coefficients.
        groups: the bands and the cells, each a number for every coefficient, [C H W], and how many there are.
    """

    def __init__(self, like: Tensor) -> None:
        channels, *_ = shape = (*like.shape,)
        device = like.device
        self.basis = basis = blocks(shape, device)
        colours = COLOUR / (1 + (basis.cycles / (COARSE * min(shape[1:]))).square())
        amounts = torch.cat([torch.ones_like(colours)[None], colours.expand(channels - 1, -1, -1)])
        self._base: Tensor = amounts * torch.exp(-MIDDLE * basis.away)
        band = (basis.cycles * (BANDS * 0.999 / max(float(basis.cycles.max()), 1e-9))).long()
        colour = torch.arange(channels, device=device).view(-1, 1, 1)
        groups = (colour * BANDS + band, basis.cell.expand(shape))
        self.groups = [(group.flatten(), int(group.max()) + 1) for group in groups]
        self._usual = self._base / self._base.sum()
        self._shares = [summed(groups, self._usual)[0].clamp_min(1e-12) for groups in self.groups]
        self._logs = [torch.zeros(size, device=device) for _, size in self.groups]
        self._informed: dict[int, list[Tensor]] = {}
        self._shape = shape

    def hint(self, perturbation: Tensor) -> Tensor:
        """The product of a perturbation's three ratios in every coefficient, [C,H,W].

        Args:
            perturbation: a boundary point less the image [1,C,H,W], not 0.
        """
        energy = self.basis.analyse(perturbation)[0].square()
        energy = energy / energy.sum()
        ratios = energy / self._usual + FLOOR
        for groups, share in zip(self.groups, self._shares, strict=True):
            (there,) = summed(groups, energy)
            ratios *= (there / share + FLOOR)[groups[0]].view(self._shape)
        return ratios / (1 + FLOOR) ** (1 + len(self.groups))

    def variances(self, hint: Tensor | None = None) -> Tensor:
        """The prior variances c [C,H,W], multiplied by a hint [C,H,W] where there is one; their sum is 1."""
        factor = torch.zeros(self._base.shape, device=self._base.device)
        for log, (group, _) in zip(self._logs, self.groups, strict=True):
            factor += log[group].view(self._shape)
        c = self._base * factor.exp_()
        if hint is not None:
            c *= hint
        return c / c.sum()

    def enter(self) -> int:
        """The number of one more image that learns."""
        self._informed[len(self._informed)] = [torch.zeros_like(log) for log in self._logs]
        return len(self._informed) - 1

    def learn(self, image: int, evidence: Evidence, c: Tensor) -> None:
        """Take in the evidence of an image, by its number, in place of what it told before; c [C,H,W] are its variances."""
        nothing, cells = evidence.heard[1:].square().mean(0), self.groups[-1]
        there, sent = summed(cells, nothing, evidence.spread)
        kept = (there / sent.clamp_min(1e-9))[cells[0]].view(self._shape)  # what clipping left of the noise
        spread = evidence.spread.clamp_min(1e-9) * kept.clamp_min(1e-3)
        signal = torch.where(evidence.spread > 0, c * (evidence.precision * kept).square() / spread, 0.0)
        excess = (evidence.heard[0].square() - nothing) / spread
        weight = signal / (2 * (1 + signal).square() * (1 + 1 / SHUFFLES))
        score, information = weight * (excess - signal), weight * signal
        score = score - score.sum() / information.sum().clamp_min(1e-9) * information
        for k, groups in enumerate(self.groups):
            if groups[1] == 1:
                continue
            slope, own = summed(groups, score, information)
            self._informed[image][k] = own
            everyone = torch.stack([each[k] for each in self._informed.values()]).sum(0)
            pull = TRUST * self._logs[k] / len(self._informed)
            step = ((slope - pull) / (everyone + TRUST)).clamp_(-0.5, 0.5)
            self._logs[k] = (self._logs[k] + step).clamp_(-3, 3)
