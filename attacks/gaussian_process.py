"""Gaussian processes that cost little per observation: botorch models whose bookkeeping is incremental.

`Process` is a botorch `Model`, so that botorch's acquisition functions work on it; its posterior is that of botorch's
`SingleTaskGP` with the same constant mean, scaled isotropic RBF kernel and noise. What differs is the cost:

- an observation appends a row to the Cholesky factor of the covariance, O(n^2), where a new model starts at O(n^3);
- hyper-parameters maximise the marginal likelihood over a grid of lengthscales and noise ratios, mean and variance in
  closed form: one eigendecomposition a lengthscale, a twentieth of what `fit_gpytorch_mll` costs and no local optimum;
- the lengthscale is shared by all dimensions. Points are meant to be directions, vectors of length 1, whose distances are
  of order 1 in any dimension: the prior of the lengthscale needs no scaling with the dimension.

All of it is float64 on the host: the matrices are small, and some accelerators have no float64. botorch takes seconds to
import: import this module where a process is needed, not before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # a library below botorch still compiles by torch.jit
    from botorch.acquisition.analytic import (
        AnalyticAcquisitionFunction,
        LogExpectedImprovement,
        LogProbabilityOfImprovement,
        PosteriorMean,
        UpperConfidenceBound,
    )
    from botorch.models.model import Model

JITTER = 1e-9
"""Least conditional variance, as a share of the prior variance."""
SAME = 1e-6
"""Directions whose cosine is less than this from 1 count as one."""
LENGTHSCALES = torch.logspace(-0.5, 1, 10, dtype=torch.float64)
NOISE_RATIOS = torch.logspace(-6, 0, 7, dtype=torch.float64)
"""The grid of `Process.fit`: lengthscales, and variances of the noise over the prior variance."""


class Marginals(NamedTuple):
    """Posterior means and variances [...,1,1], each point by itself: all that analytic acquisition functions look at."""

    mean: Tensor
    variance: Tensor


class Process(Model):
    """Exact Gaussian process regression, one observation at a time.

    Args:
        dim: d, the length of a point.
        lengthscale: of the kernel variance exp(-|x - x'|^2 / (2 lengthscale^2)).
        variance: prior variance of a value.
        noise: variance of an observation's noise.
        mean: prior mean.

    Attributes:
        points: float64 [n,d], where values were observed.
        values: float64 [n], what was observed.
    """

    num_outputs = 1
    batch_shape = torch.Size()

    def __init__(
        self, dim: int, lengthscale: float = 1.0, variance: float = 1.0, noise: float = 1e-4, mean: float = 0.0
    ) -> None:
        super().__init__()
        self.lengthscale, self.variance, self.noise, self.mean = lengthscale, variance, noise, mean
        self.points = torch.empty(0, dim, dtype=torch.float64)
        self.values = torch.empty(0, dtype=torch.float64)
        self._noises = torch.empty(0, dtype=torch.float64)
        self._factor = torch.empty(0, 0, dtype=torch.float64)  # lower Cholesky factor of K + noise
        self._weights = torch.empty(0, 1, dtype=torch.float64)  # (K + noise)^-1 (values - mean)

    def __len__(self) -> int:
        return len(self.values)

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Prior covariances [n,m] between points [n,d] and [m,d]."""
        return self.variance * torch.exp(_squares(a, b) / (-2 * self.lengthscale**2))

    def tell(self, point: Tensor, value: float, noise: float | None = None) -> None:
        """Add what was observed at a point float64 [d], with noise of its own or the common one. O(n^2 + n d)."""
        n, noise = len(self), self.noise if noise is None else noise
        across = torch.linalg.solve_triangular(self._factor, self.kernel(self.points, point[None]), upper=False)
        left = max(self.variance + noise - float((across**2).sum()), JITTER * self.variance)
        factor = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        factor[:n, :n], factor[n, :n], factor[n, n] = self._factor, across[:, 0], math.sqrt(left)
        self._factor = factor
        self.points = torch.cat([self.points, point[None]])
        self.values = torch.cat([self.values, self.values.new_tensor([value])])
        self._noises = torch.cat([self._noises, self._noises.new_tensor([noise])])
        self._weigh()

    def tell_side(self, point: Tensor, threshold: float, above: bool) -> None:
        """Add that the value at a point float64 [d] is above a threshold, or not: one bit. O(n^2 + n d).

        Assumed density filtering with a probit likelihood (Rasmussen and Williams 2006, section 3.6): the posterior at the
        point, given the bit, is replaced by the normal distribution of the same mean and variance, which is what an
        observation of some value with some noise would have made of it; that observation is added.
        """
        with torch.no_grad():
            mean, variance = (float(moment) for moment in self.moments(point[None]))
        sign = 1.0 if above else -1.0
        spread = math.sqrt(variance + self.noise)
        z = torch.tensor(sign * (mean - threshold) / spread, dtype=torch.float64)
        # phi(z) / Phi(z), in logarithms: Phi underflows where the bit comes as a great surprise.
        ratio = float(torch.exp(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(z)))
        shrink = variance / spread**2 * ratio * (float(z) + ratio)  # the share of the variance that the bit removes
        if shrink <= JITTER:
            return  # the bit was a matter of course
        shift = sign * variance / spread * ratio
        self.tell(point, mean + shift / shrink, variance * (1 - shrink) / shrink)

    @property
    def means(self) -> Tensor:
        """Posterior means [n] of the values at the points observed. O(n)."""
        return self.values - self._noises * self._weights[:, 0]

    def moments(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and variances [m] of the values at points float64 [m,d]. O(m n (n + d))."""
        cross = self.kernel(points, self.points)
        mean = self.mean + (cross @ self._weights)[:, 0]
        across = torch.linalg.solve_triangular(self._factor, cross.mT, upper=False)
        return mean, (self.variance - (across**2).sum(0)).clamp_min(JITTER * self.variance)

    def posterior(self, X: Tensor, *_: Any, **__: Any) -> Marginals:  # type: ignore[override]
        """The marginal posteriors at points [...,1,d], as botorch's acquisition functions ask for them."""
        mean, variance = self.moments(X.flatten(0, -2))
        shape = (*X.shape[:-1], 1)
        return Marginals(mean.view(shape), variance.view(shape))

    def fit(self) -> None:
        """Take the likeliest hyper-parameters of the grid; observations that are all equal tell nothing and change nothing.

        With K = R(lengthscale) + ratio I = U (D + ratio) U', mean m = 1'K^-1 y / 1'K^-1 1 and variance
        v = (y - m)'K^-1 (y - m) / n, maximises -n/2 log v - 1/2 log|K| + log prior: log-normal for the lengthscale around
        1 and for the ratio around 1e-3. Noises given with observations are replaced by the common one. O(n^3).
        """
        y, n = self.values, len(self)
        if n < 2 or not float(y.max() - y.min()) > 0:
            return
        R = torch.exp(_squares(self.points, self.points) / (-2 * LENGTHSCALES.view(-1, 1, 1) ** 2))
        eigenvalues, U = torch.linalg.eigh(R)
        inverse = 1 / (eigenvalues.clamp_min(0)[:, None] + NOISE_RATIOS[:, None])  # [lengthscales, ratios, n]
        uy, u1 = ((U.mT @ vector)[:, None] for vector in (y, torch.ones_like(y)))
        mean = (u1 * inverse * uy).sum(-1) / (u1 * inverse * u1).sum(-1)
        variance = ((uy - mean[..., None] * u1) ** 2 * inverse).sum(-1) / n
        likelihood = -n / 2 * variance.log() + inverse.log().sum(-1) / 2
        prior = (
            -0.5 * (LENGTHSCALES.log()[:, None] / 0.75) ** 2 - 0.5 * ((NOISE_RATIOS.log() - math.log(1e-3)) / 4) ** 2
        )
        i, j = divmod(int((likelihood + prior).argmax()), len(NOISE_RATIOS))
        self.lengthscale, self.variance, self.mean = float(LENGTHSCALES[i]), float(variance[i, j]), float(mean[i, j])
        self.noise = float(NOISE_RATIOS[j]) * self.variance
        self._noises = torch.full_like(y, self.noise)
        self._refactor()

    def forget(self, count: int) -> None:
        """Drop the `count` oldest observations. O(n^3)."""
        self.points, self.values, self._noises = self.points[count:], self.values[count:], self._noises[count:]
        self._refactor()

    def _refactor(self) -> None:
        covariance = self.kernel(self.points, self.points)
        covariance.diagonal().add_(self._noises + JITTER * self.variance)
        self._factor = torch.linalg.cholesky(covariance)
        self._weigh()

    def _weigh(self) -> None:
        self._weights = torch.cholesky_solve((self.values - self.mean)[:, None], self._factor)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [n,m] between points [n,d] and [m,d]."""
    return ((a * a).sum(-1, keepdim=True) + (b * b).sum(-1) - 2 * a @ b.mT).clamp_min(0)


def acquisition(name: str, process: Process, best: float, beta: float) -> AnalyticAcquisitionFunction:
    """botorch's acquisition function of a name: ei (in logarithms), poi (in logarithms), pm, or ucb.

    Args:
        best: the value that ei and poi want improved.
        beta: weight of the variance in ucb, mean + sqrt(beta variance).
    """
    if name == "ei":
        return LogExpectedImprovement(process, best)
    if name == "poi":
        return LogProbabilityOfImprovement(process, best)
    return PosteriorMean(process) if name == "pm" else UpperConfidenceBound(process, beta)


def maximise(
    function: AnalyticAcquisitionFunction,
    starts: Tensor,
    asked: Tensor,
    admit: Callable[[Tensor], Tensor],
    room: float = SAME,
    rounds: int = 2,
    kept: int = 2,
    steps: tuple[float, ...] = (0.1, 0.4, 0.7, 1.5),
) -> Tensor:
    """A fresh direction [d] at which an acquisition function is high: the best start, carried uphill by a few steps.

    From the `kept` best fresh starts and from the best of those that were asked, every round tries steps of several lengths
    along the tangential gradient at once and keeps what is fresh and better than before. What was asked is climbed from but
    never returned, unless every start was asked: a mean is highest where a high value was seen, and would be asked for ever.
    Where no start has room, only the same direction counts as asked.

    Args:
        starts: directions of length 1, float64 [m,d].
        asked: directions of length 1 that are not to be asked again, float64 [k,d].
        admit: from any vectors [...,d] to the nearest admissible directions.
        room: directions whose cosine with an asked one is less than this from 1 count as asked.
    """
    with torch.no_grad():
        values, known = function(starts[:, None]), _among(starts, asked, room)
        if known.all():
            room, known = SAME, _among(starts, asked, SAME)
    fresh, stale = values.masked_fill(known, -math.inf), values.masked_fill(~known, -math.inf)
    index = torch.cat([fresh.topk(min(kept, len(starts))).indices, stale.argmax(dim=0, keepdim=True)])
    best, values, lengths = starts[index], fresh[index], starts.new_tensor(steps)[:, None]
    for _ in range(rounds):
        points = best.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(points[:, None]).sum(), points)
        tangent = F.normalize(gradient - (gradient * best).sum(1, keepdim=True) * best, dim=1)
        trials = admit(best[:, None] + lengths * tangent[:, None])
        flat = trials.flatten(0, 1)
        with torch.no_grad():
            found = function(flat[:, None]).masked_fill_(_among(flat, asked, room), -math.inf)
        found, which = found.view(len(best), -1).max(1)
        better = found > values
        if not better.any():
            break
        best = torch.where(better[:, None], trials[torch.arange(len(best)), which], best)
        values = torch.where(better, found, values)
    return best[values.argmax()]


def _among(points: Tensor, asked: Tensor, room: float) -> Tensor:
    """Which of the directions [m,d] are nearer to one of [k,d] than `room` in terms of 1 - cosine, bool [m]."""
    return (points @ asked.mT > 1 - room).any(1)
