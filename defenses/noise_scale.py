"""How much noise a model can take: the largest scale that costs no more accuracy than stated, with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbox.boxes import ModuleBox, evaluating
from robustbox.errors import InputError
from robustbox.oracle import Oracle
from robustbox.protocol import BlackBox, Defense
from robustbox.trainer import clerks

from .layers import find, intercepted
from .random_features import spread_of

_ONE_SIDED, _TWO_SIDED, _HOPELESS = 1.645, 1.96, 3.0
"""Standard errors: of the bound that decides (95 %), of the interval that is reported (95 %), and to give a scale up early."""


@dataclass(frozen=True)
class Calibrated:
    """A scale of noise and what it costs.

    Args:
        nu: the scale.
        drop: share of accuracy that it costs, the mean over images and draws; `low` to `high` is its 95 % interval.
        bound: the upper bound, at 95 % one-sided, that was held to the target.
        accuracy: of the model without noise, on the same images.
        images, draws: how many images, and answers to each.
    """

    nu: float
    drop: float
    low: float
    high: float
    bound: float
    accuracy: float
    images: int
    draws: int

    def told(self) -> str:
        """In one line."""
        interval = f"95 % interval {self.low:.2%} to {self.high:.2%}"
        return f"scale {self.nu:.4g} costs {self.drop:.2%} of {self.accuracy:.1%} ({interval})"

    def record(self) -> dict[str, float]:
        """As plain JSON values."""
        return asdict(self)


def calibrate(
    recipe: Callable[[float], Defense],
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    drop: float,
    *,
    between: tuple[float, float] = (1e-4, 10.0),
    draws: int = 5,
    steps: int = 12,
    fused: int = 32,
    seed: int = 0,
    clean: NDArray[np.bool_] | None = None,
) -> Calibrated:
    """The largest nu in a range of which the drop in accuracy is at most `drop`, by its upper 95 % bound.

    Bisects log nu. All scales see the same unit noise (common random numbers), so that the drop all but grows with nu; a
    scale whose drop is beyond doubt too large after a part of the images is given up there.

    Args:
        recipe: the defense of a scale.
        oracle: the undefended black box; what is asked stands on its `calibrate` ledger.
        images: [N,C,H,W] in [0, 1] on the black box's device, 1000 or more, none of them attacked later.
        labels: N true classes.
        drop: share of accuracy that may be lost: 0.02 is 2 %.
        between: the range of nu.
        draws: answers to each image at each scale.
        steps: bisections.
        fused: rows a pass.
        seed: of the noise.
        clean: which images the model gets right, where that is known already.

    Query cost: at most N (1 + draws (steps + 2)) rows.

    Raises:
        InputError: the least scale of the range already costs more.
    """
    truth = labels.cpu().numpy()
    sight = right(oracle, oracle.box, images, truth, 0, fused) if clean is None else clean

    def at(nu: float) -> Calibrated | None:
        """What a scale costs, or None where that is too much."""
        box = recipe(nu).wrap(oracle.box, seed)
        share = np.zeros(len(images))
        for draw in range(draws):
            for start in range(0, len(images), 8 * fused):
                part = slice(start, start + 8 * fused)
                share[part] += right(oracle, box, images[part], truth[part], draw * len(images) + start, fused) / draws
                if draw == 0 and _hopeless(sight[: part.stop], share[: part.stop] * draws, drop):
                    return None
        mean, error = _mean(sight - share)
        if mean + _ONE_SIDED * error > drop:
            return None
        low, high = mean - _TWO_SIDED * error, mean + _TWO_SIDED * error
        bound = mean + _ONE_SIDED * error
        return Calibrated(nu, mean, low, high, bound, float(sight.mean()), len(images), draws)

    low, high = math.log(between[0]), math.log(between[1])
    best = at(between[0])
    if best is None:
        raise InputError(
            f"noise of scale {between[0]:g} already costs more than {drop:.2%} accuracy, as far as {len(images)} images "
            "can tell: allow more, or calibrate on more images"
        )
    if (widest := at(between[1])) is not None:
        return widest
    for _ in range(steps):
        middle = (low + high) / 2
        found = at(math.exp(middle))
        low, high, best = (low, middle, best) if found is None else (middle, high, found)
    return best


def right(
    oracle: Oracle, box: BlackBox, images: Tensor, truth: NDArray[np.int64], account: int, fused: int
) -> NDArray[np.bool_]:
    """Which images a black box gets right, sent from accounts of the evaluator's from number `account` on: bool [N]."""
    hits = []
    door = Oracle(box)
    door.ledger = oracle.ledger
    for start in range(0, len(images), fused):
        rows = images[start : start + fused]
        senders = clerks(account + start, len(rows))
        hits.append(door.ask(rows, senders, {"calibrate": len(rows)}).labels.numpy() == truth[start : start + fused])
    return np.concatenate(hits)


def gradient_norm(
    box: ModuleBox, at: Sequence[str], images: Tensor, labels: Tensor, scale: str = "std", fused: int = 32
) -> float:
    """The mean over images of ||dL/dh||, at all places together, in units of what nu multiplies; L is the margin.

    L = z_y - max_{k != y} z_k, the loss of the paper's attacks. The place with the largest nu ||dL/dh|| at the same drop
    in accuracy makes the most of an attack's decisions wrong. The defender's own: it needs gradients.
    """
    places, norms = find(box.module, at), []
    for start in range(0, len(images), fused):
        rows, y = images[start : start + fused], labels[start : start + fused, None].to(images.device)
        held: dict[int, Tensor] = {}

        def hold(k: int, h: Tensor, held: dict[int, Tensor] = held) -> Tensor:
            held[k] = h if h.requires_grad else h.detach().requires_grad_()
            return held[k]

        with torch.enable_grad(), evaluating(box.module), intercepted(places, hold):
            z = box.scores_of(box.module(rows), len(rows))
            others = z.scatter(1, y, -torch.inf).amax(dim=1)
            loss = (z.gather(1, y)[:, 0] - others).sum()
        gradients = torch.autograd.grad(loss, list(held.values()))
        squares = torch.zeros(len(rows), device=images.device)
        for h, g in zip(held.values(), gradients, strict=True):
            unit = spread_of(h, len(rows)) if scale == "std" else 1.0
            squares += (g.reshape(len(rows), -1).norm(dim=1) * unit) ** 2
        norms.append(squares.sqrt())
    return float(torch.cat(norms).mean())


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """A mean and its standard error; with less than half an image of doubt never believed (no change seen is not none)."""
    spread = max(float(values.std()), 0.5 / math.sqrt(len(values)))
    return float(values.mean()), spread / math.sqrt(len(values))


def _hopeless(clean: NDArray[np.bool_], noisy: NDArray[np.float64], drop: float) -> bool:
    mean, error = _mean(clean - noisy)
    return mean - _HOPELESS * error > drop
