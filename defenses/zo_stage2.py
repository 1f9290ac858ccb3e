"""Stage 2 of ZO-AE-DS: denoiser and encoder follow gradients that are estimated through a black box, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.boxes import ModuleBox
from robustbox.errors import InputError
from robustbox.identity import sha256, stream
from robustbox.protocol import ANSWERED, Answer
from robustbox.trainer import Workshop

from .zo_checkpoint import Checkpoint
from .zo_networks import Guard

if TYPE_CHECKING:
    from .zo_training import ZOTrainer


class Stage2:
    """The queries: a loop of estimated gradients, with looks at the held-out images and checkpoints."""

    def __init__(self, recipe: ZOTrainer, guard: Guard, shop: Workshop, own: Tensor, other: Tensor) -> None:
        self.recipe, self.guard, self.shop, self.own, self.other = recipe, guard, shop, own, other
        trained = {"denoiser": [guard.denoiser], "whole": [guard.denoiser, guard.encoder]}
        parts = trained.get(recipe.parts, [guard.denoiser, guard.encoder, guard.decoder])
        for parameter in guard.parameters():
            parameter.requires_grad_(False)
        self.learnt = [parameter.requires_grad_() for part in parts for parameter in part.parameters()]
        self.optimizer = torch.optim.Adam(self.learnt, recipe.rate, weight_decay=recipe.weight_decay)
        self.noise = stream(shop.box.device, shop.seed, recipe.name, "noise")
        self.order = stream(torch.device("cpu"), shop.seed, recipe.name, "batches")
        with torch.no_grad():
            d = guard.eval().latent(shop.images[:1]).numel()
        self.cost = recipe.cost(d) * recipe.batch
        self.steps = recipe.rows // self.cost
        self.looks = {round(self.steps * i / 10) for i in range(1, 11)} - {0}
        self.best, self.kept = -1.0, {name: value.clone() for name, value in guard.state_dict().items()}
        self.trend: list[list[float]] = []
        self.flat = 0.0
        self.book = Checkpoint(shop, {**recipe.options(), "images": len(shop.images), "first": sha256(shop.images[0])})

    def run(self) -> None:
        """Train, and leave the best weights in the guard."""
        step, recipe, shop = self.book.restore(self), self.recipe, self.shop
        if not step:
            self.agreed = shop.ask(shop.images[self.other], "verify")
            self._look(0)
        while step < self.steps:
            self.book.announce(step, self.cost)
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.rate * (1 if 3 * step < 2 * self.steps else 0.1)
            self._step()
            step += 1
            if step in self.looks:
                self._look(step)
            self.book.keep(self, step)
        self.book.close(self, step)
        self.guard.load_state_dict(self.kept)
        self.guard.eval().requires_grad_(False)
        shop.record |= {
            "steps": step,
            "agreement": self.best,
            "agreement_by_rows": self.trend,
            "flat": self.flat / step,
        }
        if self.flat / step > 0.2:
            shop.report(
                f"warning: {self.flat / step:.0%} of all differences were exactly 0: are the scores rounded? raise mu"
            )

    def _step(self) -> None:
        recipe, shop = self.recipe, self.shop
        chosen = self.own[torch.randint(len(self.own), (recipe.batch,), generator=self.order)]
        images = shop.images[chosen]
        if recipe.augment:
            images = augmented(images, self.order)
        if recipe.truth:
            goal = torch.tensor([shop.labels[i] for i in chosen.tolist()], device=images.device)
        else:
            goal = self._goal(shop.ask(images))
        self.guard.denoiser.train()  # its batch statistics; the encoder has none
        noisy = images + recipe.sigma * torch.randn(images.shape, device=images.device, generator=self.noise)
        denoised = self.guard.denoiser(noisy)
        z = self.guard.encoder(denoised)
        if recipe.order == "first":
            assert isinstance(shop.box, ModuleBox)
            shop.oracle.ledger["train"] += len(z)
            returned = shop.box.scores_of(shop.box.module.eval()(self.guard.decoder(z)), len(z))
            shop.oracle.scores = shop.box.scores
            loss = self._losses(returned, goal, 1).mean()
        else:
            flat = z.detach().flatten(1)

            def value(points: Tensor) -> Tensor:
                with torch.no_grad():
                    rows = self.guard.decoder(points.reshape(-1, *z.shape[1:]))
                return self._losses(_scores(shop.ask(rows)), goal, points.shape[1])

            gradient, zeros = recipe.gradient().estimate(value, flat, self.noise)
            self.flat += zeros
            loss = (z.flatten(1) * gradient).sum(dim=1).mean()
        if recipe.lambda_mse:
            loss = loss + recipe.lambda_mse * (denoised - images).square().flatten(1).sum(dim=1).mean()
        # Gradients of the learnt weights alone: nothing is left on a model that a first-order step went through.
        for parameter, gradient in zip(self.learnt, torch.autograd.grad(loss, self.learnt), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.guard.eval()

    def _goal(self, answer: Answer) -> Tensor:
        """What the guarded model shall answer: labels int64 [B], or all scores [B,K]."""
        scores = _scores(answer)
        return scores if self.recipe.loss == "mse" else scores.argmax(dim=1)

    def _losses(self, scores: Tensor, goal: Tensor, points: int) -> Tensor:
        """The losses [B,points] of scores [B points,K], in float64."""
        scores, goals = scores.double(), goal.repeat_interleave(points, dim=0)
        if self.recipe.loss == "mse":
            return (scores - goals).square().mean(dim=1).view(-1, points)
        logs = scores.log_softmax(1) if self.shop.oracle.scores == "logit" else scores.clamp_min(1e-12).log()
        return F.nll_loss(logs, goals, reduction="none").view(-1, points)

    def _look(self, step: int) -> None:
        """Judge the weights on the held-out images under one noise draw, the same in every look, and keep the best."""
        images = self.shop.images[self.other]
        noise = torch.randn(images.shape, device=images.device, generator=stream(images.device, self.shop.seed, "look"))
        with torch.no_grad():
            answer = self.shop.ask(self.guard.eval()(images + self.recipe.sigma * noise), "verify")
        if self.recipe.loss == "mse":
            score = -float((_scores(answer) - _scores(self.agreed)).square().mean())
        else:
            score = float((answer.labels == self.agreed.labels).double().mean())
        if not self.trend or score > self.best:
            self.best, self.kept = score, {name: value.clone() for name, value in self.guard.state_dict().items()}
        self.trend.append([step * self.cost, score])
        self.shop.report(f"step {step} of {self.steps}, {step * self.cost} rows: held out {score:.4f}")


def _scores(answer: Answer) -> Tensor:
    if answer.scores is None or not bool((answer.status == ANSWERED).all()):
        raise InputError("zo-ae-ds needs scores for every row, and this black box gave none")
    return answer.scores


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [C,H,W] cropped at random from itself padded by 4 pixels, and flipped with probability one half."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    shifts, flips = torch.randint(9, (n, 2), generator=generator).tolist(), torch.rand(n, generator=generator) < 0.5
    crops = [row[:, t : t + height, u : u + width] for row, (t, u) in zip(padded, shifts, strict=True)]
    return torch.stack([crop.flip(2) if flip else crop for crop, flip in zip(crops, flips.tolist(), strict=True)])
