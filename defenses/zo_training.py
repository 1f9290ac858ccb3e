"""Trains ZO-AE-DS: an auto-encoder without a query, then denoiser and encoder against a black box by estimated gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbox.boxes import ModuleBox
from robustbox.errors import InputError
from robustbox.identity import derive_seed, stream
from robustbox.options import check_options
from robustbox.protocol import Defense
from robustbox.trainer import Trainer, Workshop

from .zo_ae_ds import ZOAEDS
from .zo_estimators import CGE, RGE, GradientEstimator, TwoPoint
from .zo_networks import Guard, architecture, fitting
from .zo_stage2 import Stage2

_CHUNK = 64
"""Directions of a batch that are decoded and asked at once."""
_LEAST = {"q": 1, "rows": 1, "batch": 1, "ae_epochs": 0, "pretrain": 0, "depth": 2, "width": 1}
_POSITIVE, _NOT_NEGATIVE = ("mu", "rate", "ae_rate"), ("kick", "sigma", "weight_decay", "lambda_mse")
"""What numbers must be: the least whole ones, and others."""


@dataclass(frozen=True, kw_only=True)
class ZOTrainer(Trainer):
    """ZO-AE-DS and its relatives (Zhang et al., ICLR 2022) in one code path; docs/zo-ae-ds.md has formulas and measurements.

    Stage 1 trains the auto-encoder on clean images, without a query. In stage 2 a step asks, for each image x of a batch,
    the model's answer y to x, and estimates the gradient of l(z) = CE(f(Dec(z)), y) at z = Enc(D(x + delta)); back-propagated
    through Enc and D it moves their weights. The decoder is frozen: it belongs to the black box. Without an auto-encoder
    (`ds`) z is the denoised image. A tenth of the images (at most 500) is held out; of ten looks at them during
    training (agreement with y under one noise draw) the best one's weights are kept.

    Args:
        variant: ae-ds, ds (no auto-encoder), or what either is before a query, its control: ae-only (stage 1, and the
            pretraining if any) and ds-only (the pretraining).
        order: zeroth, or first (gradients through the model, which must be a torch module: the baseline).
        estimator: rge, cge (central), cge-forward or two-point.
        q: directions of rge; pairs of two-point.
        mu: step of the differences.
        kick: of two-point.
        sigma: standard deviation of the noise.
        rows: rows that stage 2 may ask on the ledger `train`; a first-order step counts two rows an image.
        batch: images a step.
        rate: learning rate of Adam in stage 2; a tenth of it in the last third.
        weight_decay: of Adam.
        loss: cross-entropy with the model's own label, or mse between all scores (for models that return images).
        truth: take the true class instead of the model's answer; saves its row.
        lambda_mse: weight of |D(x + delta) - x|^2 in the loss; it costs no query (0 is the paper's code).
        parts: what stage 2 trains: denoiser, whole (denoiser and encoder), or whole-plus (decoder too; first order only).
        autoencoder: an architecture by name; null takes the first that fits the images.
        ae_epochs: epochs of stage 1.
        ae_rate: learning rate of stage 1 (the paper has 1e-3, and 600 epochs).
        pretrain: epochs of denoising by mean squared error before stage 2, without a query.
        depth, width: of the denoiser (17 and 64 in the paper).
        augment: random crops (4 pixels) and flips in stage 2.

    Raises:
        InputError: a number that means nothing.
    """

    name: ClassVar[str] = "zo-ae-ds"

    variant: Literal["ae-ds", "ds", "ae-only", "ds-only"] = "ae-ds"
    order: Literal["zeroth", "first"] = "zeroth"
    estimator: Literal["rge", "cge", "cge-forward", "two-point"] = "cge"
    q: int = 192
    mu: float = 0.005
    kick: float = 0.0
    sigma: float = 0.25
    rows: int = 300_000
    batch: int = 16
    rate: float = 1e-3
    weight_decay: float = 1e-4
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    truth: bool = False
    lambda_mse: float = 0.0
    parts: Literal["denoiser", "whole", "whole-plus"] = "whole"
    autoencoder: str | None = None
    ae_epochs: int = 30
    ae_rate: float = 3e-3
    pretrain: int = 0
    depth: int = 5
    width: int = 24
    augment: bool = False

    def __post_init__(self) -> None:
        check_options(self.name, self)
        for option, least in _LEAST.items():
            if (value := getattr(self, option)) < least:
                raise InputError(f"{option} of {self.name} must be a whole number of at least {least}, not {value}")
        for option in _POSITIVE:
            if not 0 < (value := getattr(self, option)) < math.inf:
                raise InputError(f"{option} of {self.name} must be a positive number, not {value}")
        for option in _NOT_NEGATIVE:
            if not 0 <= (value := getattr(self, option)) < math.inf:
                raise InputError(f"{option} of {self.name} must be a finite number of at least 0, not {value}")

    def train(self, shop: Workshop) -> Defense:
        """Make the defense; raises InputError before anything is trained or asked where black box or images do not fit."""
        layout = self._check(shop)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(shop.seed, self.name, "weights") % 2**32)
            guard = Guard(**layout).to(shop.box.device)
        held = min(500, max(1, len(shop.images) // 10))
        order = torch.randperm(len(shop.images), generator=stream(torch.device("cpu"), shop.seed, self.name, "split"))
        own, other = order[held:], order[:held]
        if layout["autoencoder"] is not None:
            shop.record["ae_mse"] = _stage_1(guard, shop, own, self.ae_epochs, self.ae_rate)
        if self.pretrain:
            _pretrain(guard.denoiser, shop, own, self.pretrain, self.sigma)
        if self._asks:
            Stage2(self, guard, shop, own, other).run()
        return ZOAEDS.of(guard, layout, self.sigma)

    def gradient(self) -> GradientEstimator:
        """The estimator that the options name."""
        if self.estimator == "rge":
            return RGE(self.mu, _CHUNK, self.q)
        if self.estimator == "two-point":
            return TwoPoint(self.mu, _CHUNK, self.q, "sphere", self.kick)
        return CGE(self.mu, _CHUNK, self.estimator == "cge")

    def cost(self, d: int) -> int:
        """Rows of an image in a step of stage 2, z having d values: the answer to imitate, and the estimate."""
        return (not self.truth) + (1 if self.order == "first" else self.gradient().rows(d))

    @property
    def _asks(self) -> bool:
        """Whether stage 2 takes place."""
        return not self.variant.endswith("-only")

    def _check(self, shop: Workshop) -> dict[str, Any]:
        shape, encodes = tuple(shop.images.shape[1:]), self.variant.startswith("ae")
        name = (self.autoencoder or fitting(shape)) if encodes else None
        if encodes and (name is None or architecture(name).shape != shape):
            raise InputError(f"no auto-encoder for images of {shape}: take variant ds, or name one with --autoencoder")
        if self.order == "first" and not isinstance(shop.box, ModuleBox):
            raise InputError(
                "order=first needs gradients through the model, and this one is no torch module: order=zeroth"
            )
        if self.parts == "whole-plus" and self.order != "first":
            raise InputError("whole-plus trains the decoder, which belongs to the black box: it needs order=first")
        if self.variant == "ds-only" and not self.pretrain:
            raise InputError("ds-only without pretraining leaves the images as they are: give epochs by --pretrain")
        if self._asks and shop.box.scores == "none":
            raise InputError("zo-ae-ds needs scores, and this black box answers labels only")
        if self._asks and len(shop.images) < 2 * self.batch:
            raise InputError(
                f"zo-ae-ds needs at least two batches of {self.batch} images, not {len(shop.images)} images"
            )
        d = math.prod(shape) if name is None else architecture(name).latent
        if self._asks and self.rows < (step := self.batch * self.cost(d)):
            raise InputError(
                f"rows={self.rows} do not pay for one step, which asks {step}: more rows, or a smaller batch"
            )
        return {"channels": shape[0], "depth": self.depth, "width": self.width, "autoencoder": name}


def _stage_1(guard: Guard, shop: Workshop, own: Tensor, epochs: int, rate: float) -> float:
    """Train encoder and decoder on clean images; returns the mean squared error of the last epoch."""
    guard.begin_at(shop.images[own].mean(dim=(0, 2, 3)))
    both = nn.Sequential(guard.encoder, guard.decoder)
    return _regress(both, shop, own, epochs, rate, 0.0, "auto-encoder")


def _pretrain(denoiser: nn.Module, shop: Workshop, own: Tensor, epochs: int, sigma: float) -> None:
    """Train the denoiser to undo noise, by mean squared error."""
    _regress(denoiser, shop, own, epochs, 1e-3, sigma, "denoiser")
    denoiser.eval()


def _regress(
    network: nn.Module, shop: Workshop, own: Tensor, epochs: int, rate: float, sigma: float, what: str
) -> float:
    """Teach a network to return images from noisy ones; Adam, batches of 32, no query."""
    optimizer = torch.optim.Adam(network.parameters(), rate)
    order, noise = (stream(device, shop.seed, what) for device in (torch.device("cpu"), shop.box.device))
    error = torch.zeros(())
    for epoch in range(epochs):
        total = torch.zeros((), device=shop.box.device)
        for part in own[torch.randperm(len(own), generator=order)].split(32):
            images = shop.images[part]
            noisy = (
                images
                if not sigma
                else images + sigma * torch.randn(images.shape, device=images.device, generator=noise)
            )
            loss = F.mse_loss(network.train()(noisy), images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(part)
        error = total / len(own)
        if epoch + 1 == epochs or epoch % 5 == 4:
            shop.report(f"{what}, epoch {epoch + 1} of {epochs}: mean squared error {error.item():.5f}")
    return error.item()
