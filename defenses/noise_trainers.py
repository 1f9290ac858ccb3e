"""Trainers that find how much noise a model can take: `python -m robustbox.defend random-features` and its baselines.

python -m robustbox.defend random-features --model cifar10-resnet20 --data npz:IMAGES --drop 0.02 --out noise.safetensors
python -m robustbox.attack --model cifar10-resnet20 --defense noise.safetensors
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from robustbox.boxes import ModuleBox
from robustbox.errors import InputError
from robustbox.options import check_options
from robustbox.protocol import Defense
from robustbox.trainer import Trainer, Workshop

from .input_noise import InputNoise
from .layers import find
from .logit_noise import LogitNoise
from .noise_scale import Calibrated, calibrate, gradient_norm, right
from .random_features import RandomFeatures
from .row_streams import Distribution, Mode

_FEW, _LEAST, _FUSED = 200, 50, 32
"""Images on which gradients are taken for the choice of a place; least number of images; rows a pass."""

_CANDIDATES = ("stem", "stage:*")


@dataclass(frozen=True)
class Calibration(Trainer):
    """What the trainers of noise share: the largest scale whose drop in accuracy, by its upper 95 % bound, is at most `drop`.

    Args:
        drop: share of accuracy that the noise may cost: 0.02 is 2 %.
        draws: answers to each image at each scale.
        steps: bisections of the logarithm of the scale.

    Raises:
        InputError: a number that means nothing.
    """

    drop: float = 0.02
    draws: int = 5
    steps: int = 12

    def __post_init__(self) -> None:
        check_options(self.name, self)
        if not (0 < self.drop < 1 and self.draws >= 1 and self.steps >= 1):
            raise InputError("drop must be a share between 0 and 1, draws and steps whole numbers of at least 1")

    def _largest(
        self, shop: Workshop, recipes: dict[str, Callable[[float], Defense]], between: tuple[float, float]
    ) -> dict[str, Calibrated]:
        """The largest scale of each recipe; what it costs is reported as it is found."""
        if not (shop.labels and len(shop.images) >= _LEAST):
            raise InputError(f"calibration needs {_LEAST} images or more (better 1000), there are {len(shop.images)}")
        for recipe in recipes.values():
            recipe(between[0]).wrap(shop.box, shop.seed)  # what cannot be defended costs no row
        labels = torch.tensor(shop.labels)
        clean = right(shop.oracle, shop.box, shop.images, labels.numpy(), 0, _FUSED)
        found = {}
        for name, recipe in recipes.items():
            found[name] = calibrate(
                recipe,
                shop.oracle,
                shop.images,
                labels,
                self.drop,
                between=between,
                draws=self.draws,
                steps=self.steps,
                fused=_FUSED,
                seed=shop.seed,
                clean=clean,
            )
            shop.report(f"{name}: {found[name].told()}")
        return found


@dataclass(frozen=True)
class RandomFeaturesTrainer(Calibration):
    """How much noise on hidden features a network can take, and where it does most.

    Each candidate place gets the largest nu that keeps the drop; of these the one is taken with the largest nu ||dL/dh||
    (the mean over images, L the margin): there most of an attack's comparisons go wrong at the same loss of accuracy.

    Args:
        at: places that get noise together, as in `random-features`, or `auto`: the one of the candidates that does most.
        candidates: places to choose from, those of a `*` one by one; default: the stem and each stage.
        distribution: `gauss` or `laplace`.
        mode: `fresh`, `hash` or `frozen`.

    Query cost: at most N (1 + draws (steps + 2)) rows for each candidate, N images, on the ledger `calibrate`.
    """

    name: ClassVar[str] = "random-features"

    at: str | list[str] = "auto"
    candidates: list[str] | None = None
    distribution: Distribution = "gauss"
    mode: Mode = "fresh"

    def train(self, shop: Workshop) -> Defense:
        """The defense with the largest scale; the record holds what every candidate came to.

        Raises:
            InputError: a black box that shows no layers, or no such place.
        """
        box = shop.box
        if not isinstance(box, ModuleBox):
            raise InputError(f"random-features needs a torch module in this process, not {box.name}")
        recipes = {place: self._recipe(at) for place, at in self._places(box).items()}
        found = self._largest(shop, recipes, (1e-4, 10.0))
        table: dict[str, dict[str, float]] = {place: scale.record() for place, scale in found.items()}
        best = next(iter(found))
        if len(found) > 1:
            images, labels = shop.images[:_FEW], torch.tensor(shop.labels[:_FEW])
            for place, at in self._places(box).items():
                table[place]["gradient"] = gradient_norm(box, at, images, labels, fused=_FUSED)
                table[place]["reach"] = table[place]["gradient"] * table[place]["nu"]
                shop.report(f"{place}: nu times gradient {table[place]['reach']:.3g}")
            best = max(table, key=lambda place: table[place]["reach"])
        shop.record["calibration"] = {"target": self.drop, "at": best, **table[best], "candidates": table}
        return recipes[best](found[best].nu)

    def _places(self, box: ModuleBox) -> dict[str, list[str]]:
        """What is calibrated, by name."""
        if self.at == "auto":
            return {place.name: [place.name] for place in find(box.module, self.candidates or _CANDIDATES)}
        together = [self.at] if isinstance(self.at, str) else list(self.at)
        find(box.module, together)
        return {", ".join(together): together}

    def _recipe(self, at: list[str]) -> Callable[[float], Defense]:
        return lambda nu: RandomFeatures(nu, at, distribution=self.distribution, mode=self.mode)


@dataclass(frozen=True)
class InputNoiseTrainer(Calibration):
    """How much noise on its input a model can take.

    Query cost: at most N (1 + draws (steps + 2)) rows, N images, on the ledger `calibrate`.
    """

    name: ClassVar[str] = "input-noise"

    def train(self, shop: Workshop) -> Defense:
        """The defense with the largest sigma."""
        found = self._largest(shop, {"input": InputNoise}, (1e-4, 1.0))["input"]
        shop.record["calibration"] = {"target": self.drop, **found.record()}
        return InputNoise(found.nu)


@dataclass(frozen=True)
class LogitNoiseTrainer(Calibration):
    """How much noise on its scores a model can take.

    Query cost: at most N (1 + draws (steps + 2)) rows, N images, on the ledger `calibrate`.
    """

    name: ClassVar[str] = "logit-noise"

    def train(self, shop: Workshop) -> Defense:
        """The defense with the largest sigma."""
        found = self._largest(shop, {"scores": LogitNoise}, (1e-4, 100.0))["scores"]
        shop.record["calibration"] = {"target": self.drop, **found.record()}
        return LogitNoise(found.nu)
