"""QEBA (Li, Xu, Zhang, Yang, Li: QEBA: Query-Efficient Boundary-Based Blackbox Attack, CVPR 2020).

HopSkipJump whose estimates draw their noise in a subspace of n < d dimensions: u_b = W v_b with v_b on the unit sphere of R^n
(eq. 5). Where the subspace holds much of the gradient, an estimate from q rows has a cosine of about sqrt(q / (q + pi n / 2))
with its part there instead of sqrt(q / (q + pi d / 2)) with all of it.

    dct      the lowest frequencies of each channel, H/f x W/f of them      (QEBA-F, section 3.3.2)
    resize   H/f x W/f noise, enlarged bilinearly                           (QEBA-S, section 3.3.1)
    pca      the first principal components of the attacker's own images    (QEBA-I, section 3.3.3)

Query cost: that of `hop-skip-jump`. Norms, knob and redraw: as there, the noise within the subspace.

Deviations from the paper: those of `hop-skip-jump`; and components are those of images, not of a reference model's gradients,
which an attacker who only asks for labels does not have. At most `IMAGES` images are taken, evenly from the pool.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from robustbox.errors import InputError, unknown_name
from robustbox.protocol import Task

from .hop_skip_jump import HopSkipJump
from .subspaces import Sampler, sampler

Basis = Literal["dct", "resize", "pca"]

LARGE = 64
"""From images of this side on, the default factor is the paper's 4; in smaller ones a quarter of a side holds too little."""
IMAGES, IMAGE_BYTES = 1000, 2**27
"""Most images from which components are computed, and most memory that these take."""


@dataclass(frozen=True)
class QEBA(HopSkipJump):
    """QEBA: HopSkipJump that estimates in a subspace: dct, resize or pca (which needs a pool).

    Args:
        n0: rows of the first estimate; estimate t takes floor(n0 sqrt(t)).
        theta: tolerance of bisections over the distance, which also sets the noise; default: 1 / (20 sqrt(d)).
        subspace: where noise is drawn: dct, resize or pca.
        factor: by how much the subspace is smaller than the image along each side; default: 4 from 64 pixels a side on,
            else 2. pca has as many components as the other two, d / factor^2, at most one less than images.
    """

    name: ClassVar[str] = "qeba"

    subspace: Basis = "dct"
    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subspace not in get_args(Basis):
            raise unknown_name("subspace", self.subspace, get_args(Basis))
        if self.factor is not None and not self.factor >= 1:
            raise InputError(f"factor must be at least 1, got {self.factor}")

    def check(self, task: Task) -> None:
        """Compute the components of pca, once a run.

        Raises:
            InputError: there are no images in the pool, or no two that differ.
        """
        if self.subspace == "pca":
            if task.pool is None or len(task.pool[0]) < 2:
                raise InputError("subspace pca needs a pool of at least two images: give one, or use dct or resize")
            _COMPONENTS[task.pool[0]] = principal_components(task.pool[0])

    def _sampler(self, task: Task) -> Sampler:
        channels, height, width = task.image.shape
        factor = self.factor or (2.0 if min(height, width) < LARGE else 4.0)
        if self.subspace == "dct":
            return sampler("dct", (channels, height, width), factor, task.generator)
        if self.subspace == "resize":
            return _resized(task, factor)
        assert task.pool is not None  # checked
        basis = _COMPONENTS[task.pool[0]]
        return _within(basis[: max(round(task.image.numel() / factor**2), 1)], task)


def _within(basis: Tensor, task: Task) -> Sampler:
    """Gaussian noise in the span of an orthonormal basis [k,d], of mean square 1 a pixel."""
    scale = (basis.shape[1] / len(basis)) ** 0.5

    def draw(n: int) -> Tensor:
        noise = torch.randn(n, len(basis), generator=task.generator, device=basis.device)
        return (noise @ basis).mul_(scale).view(n, *task.image.shape)

    return draw


def _resized(task: Task, factor: float) -> Sampler:
    """Gaussian noise smaller by a factor, enlarged bilinearly, of mean square 1 a pixel."""
    channels, height, width = task.image.shape
    rows, columns = (bilinear(max(int(s / factor), 1), s).to(task.image.device) for s in (height, width))

    def draw(n: int) -> Tensor:
        size = n, channels, rows.shape[1], columns.shape[1]
        return rows @ torch.randn(size, generator=task.generator, device=rows.device) @ columns.T

    return draw


def bilinear(small: int, large: int) -> Tensor:
    """The matrix [large,small] that enlarges a signal linearly, scaled so that the mean square of white noise is kept."""
    matrix = torch.nn.functional.interpolate(torch.eye(small)[None], size=large, mode="linear")[0].T
    return matrix / matrix.square().sum(dim=1).mean().sqrt()


_COMPONENTS: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
"""The components of each pool: computed anew by every run, and forgotten with the pool."""


def principal_components(images: Tensor) -> Tensor:
    """The principal components of images [M,C,H,W]: orthonormal rows [k,CHW] by falling variance, k at most M - 1.

    Raises:
        InputError: the images are all alike.
    """
    most = min(IMAGES, IMAGE_BYTES // (images[0].numel() * 4))
    chosen = torch.linspace(0, len(images) - 1, min(len(images), most)).long().to(images.device)
    data = images[chosen].flatten(1).double()
    data = data - data.mean(dim=0)
    # By way of the Gram matrix [M,M]: images are fewer than dimensions, or not many more.
    values, vectors = torch.linalg.eigh(data @ data.T)
    if values[-1] < 1e-9 * data.shape[1]:
        raise InputError("subspace pca needs images that differ: those of the pool are all alike")
    kept = values > 1e-8 * values[-1]
    basis: Tensor = (vectors[:, kept] / values[kept].sqrt()).T @ data
    return basis.flip(0).float()
