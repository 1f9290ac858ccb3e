"""Gaussian processes that cost little per observation: botorch's, with the cheap half of its work done incrementally.

`Process` is a botorch `Model`, so that botorch's acquisition functions work on it. Its prior and its hyper-parameters are
those of botorch's `SingleTaskGP` (constant mean, scaled isotropic RBF kernel, outcomes standardised, marginal likelihood
maximised by `fit_gpytorch_mll`), fitted when asked only. In between, an observation appends one row to the Cholesky factor
of the covariance: O(n^2) where a new model costs O(n^3) for every step of its fit. All in float64, on the host: matrices
are small, and some accelerators have no float64.

botorch takes seconds to import: this module is imported where a process is needed, not before.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # a library of botorch's still compiles by torch.jit
    from botorch.acquisition import AcquisitionFunction
    from botorch.acquisition.analytic import (
        LogExpectedImprovement,
        LogProbabilityOfImprovement,
        PosteriorMean,
        UpperConfidenceBound,
    )
    from botorch.exceptions import ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.model import Model
    from botorch.posteriors import GPyTorchPosterior
    from gpytorch.constraints import GreaterThan
    from gpytorch.distributions import MultivariateNormal
    from gpytorch.kernels import RBFKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.priors import LogNormalPrior
    from linear_operator.operators import DiagLinearOperator

JITTER = 1e-8
"""Least conditional variance of an observation, as a share of the prior variance."""


class Marginals(NamedTuple):
    """Posterior means and variances [...,1,1], each point by itself: all that analytic acquisition functions look at."""

    mean: Tensor
    variance: Tensor


class Process(Model):
    """Exact regression on points [n,d], with noise that may differ between observations.

    Args:
        dim: d.
        lengthscale: of the RBF kernel exp(-|x - x'|^2 / (2 lengthscale^2)).
        variance: prior variance of a value.
        noise: variance of an observation's noise where `tell` is given none.
        mean: prior mean.
    """

    num_outputs = 1
    batch_shape = torch.Size()

    def __init__(
        self, dim: int, lengthscale: float = 1.0, variance: float = 1.0, noise: float = 1e-4, mean: float = 0.0
    ) -> None:
        super().__init__()
        self.lengthscale, self.variance, self.noise, self.mean = lengthscale, variance, noise, mean
        self._x = torch.empty(0, dim, dtype=torch.float64)
        self._y = torch.empty(0, dtype=torch.float64)
        self._noise = torch.empty(0, dtype=torch.float64)
        self._factor = torch.empty(0, 0, dtype=torch.float64)  # lower Cholesky factor of K + noise
        self._weights = torch.empty(0, 1, dtype=torch.float64)  # (K + noise)^-1 (y - mean)

    def __len__(self) -> int:
        return len(self._y)

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Prior covariances [n,m] between points [n,d] and [m,d]."""
        squares = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1) - 2 * a @ b.mT
        return self.variance * torch.exp(squares.clamp_min(0) / (-2 * self.lengthscale**2))

    def tell(self, point: Tensor, value: float, noise: float | None = None) -> None:
        """Add an observation at a point [d]: O(n^2)."""
        n, noise = len(self), self.noise if noise is None else noise
        across = torch.linalg.solve_triangular(self._factor, self.kernel(self._x, point[None]), upper=False)
        left = max(self.variance + noise - float((across**2).sum()), JITTER * self.variance)
        factor = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        factor[:n, :n], factor[n, :n], factor[n, n] = self._factor, across[:, 0], math.sqrt(left)
        self._factor = factor
        self._x = torch.cat([self._x, point[None]])
        self._y = torch.cat([self._y, self._y.new_tensor([value])])
        self._noise = torch.cat([self._noise, self._noise.new_tensor([noise])])
        self._weigh()

    def moments(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and variances [m] of the values at points [m,d]."""
        cross = self.kernel(points, self._x)
        mean = self.mean + (cross @ self._weights)[:, 0]
        across = torch.linalg.solve_triangular(self._factor, cross.mT, upper=False)
        variance = self.variance - (across**2).sum(0)
        return mean, variance.clamp_min(JITTER * self.variance)

    def posterior(self, X: Tensor, *_: Any, **__: Any) -> Marginals:
        """The marginal posteriors at points [...,1,d], as botorch's acquisition functions ask for them."""
        mean, variance = self.moments(X.flatten(0, -2))
        shape = (*X.shape[:-1], 1)
        return Marginals(mean.view(shape), variance.view(shape))

    def _weigh(self) -> None:
        self._weights = torch.cholesky_solve((self._y - self.mean)[:, None], self._factor)

    def refactor(self) -> None:
        K = self.kernel(self._x, self._x) + torch.diag(self._noise + JITTER * self.variance)
        self._factor = torch.linalg.cholesky(K)
        self._weigh()

    def tell_side(self, point, threshold, above):
        m, v = self.moments(point[None])
        m, v = float(m), float(v)
        s = 1.0 if above else -1.0
        w = math.sqrt(v + self.noise)
        z = s*(m-threshold)/w
        zt=torch.tensor(z,dtype=torch.float64)
        ratio = float(torch.exp(-0.5*zt*zt-0.5*math.log(2*math.pi)-torch.special.log_ndtr(zt)))
        m2 = m + s*v/w*ratio
        v2 = max(v - v*v/(w*w)*ratio*(z+ratio), 1e-9*v)
        prec = 1/v2-1/v
        if prec <= 1e-9/v: return
        self.tell(point, (m2/v2-m/v)/prec, 1/prec)

    def fit(self):
        n=len(self); X=self._x; y=self._y
        if not float(y.std())>0: return
        sq=(2-2*X@X.T).clamp_min(0)
        ls=torch.logspace(-0.5,1,10,dtype=torch.float64)
        lam,U=torch.linalg.eigh(torch.exp(-sq/(2*ls.view(-1,1,1)**2)))
        rho=torch.logspace(-6,0,7,dtype=torch.float64)
        inv=1/(lam.clamp_min(0)[:,None,:]+rho[None,:,None])   # [L,R,n]
        uy=(U.mT@y)[:,None]; u1=(U.mT@torch.ones_like(y))[:,None]
        mean=(u1*inv*uy).sum(-1)/(u1*inv*u1).sum(-1)
        r=uy-mean[...,None]*u1
        var=(r*r*inv).sum(-1)/n
        ll=-n/2*var.log()+0.5*inv.log().sum(-1)
        prior=-0.5*(ls.log()/0.75)**2
        ll=ll+prior[:,None]+(-0.5*((rho.log()-math.log(1e-3))/4)**2)[None]
        k=int(ll.argmax()); a,b=divmod(k,len(rho))
        self.lengthscale=float(ls[a]); self.variance=float(var[a,b]); self.noise=float(rho[b])*self.variance; self.mean=float(mean[a,b])
        self._noise=torch.full_like(y,self.noise); self.refactor()
