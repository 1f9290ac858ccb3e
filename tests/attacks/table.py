"""Every attack in every mode, for the tests that hold over all of them; and how near to the optimum each must come.

The black box is a plane in 192 dimensions (`Plane`) at l2 distance 0.5 from every image. `factors` are the median distances at
1000 and at 5000 queries over the distance of the plane, as tight as the method allows; a mode at a fixed radius must succeed
on every image within `budget` queries instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustbox.protocol import Answer, BlackBox, Norm
from tests.attacks.analytic import Flat, check_box

SHAPE = (3, 8, 8)
AWAY = 0.5
"""l2 distance of the plane from every image."""


@dataclass(frozen=True)
class Mode:
    """One attack in one of its modes.

    Args:
        attack: its name.
        norm: the norm it runs in.
        options: its options.
        targeted: whether it aims at the class beyond the plane, with a pool of images of it.
        epsilon: the radius, in units of the plane's distance (l0: in pixels); None minimises.
        own: the least distance at which any perturbation of the attack's kind succeeds, in units of the plane's: of vectors of
            one size up or down in l2, sqrt(d) / |normal|_1.
        factors: least-distance modes: median distance at 1000 and at 5000 queries over the plane's.
        budget: fixed-radius modes: queries within which every image must fall; None: this plane is not for this attack.
        restricted: whether every row it asks must lie in the ball.
    """

    attack: str
    norm: Norm = "l2"
    options: Mapping[str, Any] = field(default_factory=dict)
    targeted: bool = False
    epsilon: float | None = None
    own: float = 1.0
    factors: tuple[float, float] | None = None
    budget: int | None = None
    restricted: bool = False

    def __str__(self) -> str:
        parts = [self.attack, self.norm, *(f"{key}={value}" for key, value in self.options.items())]
        return "-".join(parts + ["targeted"] * self.targeted)

    @property
    def radius(self) -> float | None:
        """The radius in the units of images."""
        return None if self.epsilon is None else self.epsilon * optimum(self.norm)

    def setting(self) -> dict[str, Any]:
        """What `run_attack` is told beside black box, images and budget."""
        aim = {"targets": 1, "pool": (beyond(), torch.ones(4, dtype=torch.long))} if self.targeted else {}
        return {"attack": self.attack, "norm": self.norm, "epsilon": self.radius, "attack_options": self.options} | aim


class Plane(BlackBox):
    """Logits -s and s for s = 20 times how far a row lies beyond the plane of `Flat`; row by row, in float64.

    Keeps what it was asked. `frozen` answers class 0 at constant scores, whatever it is asked.
    """

    name, classes, scores = "plane", 2, "logit"

    def __init__(self, frozen: bool = False) -> None:
        self.normal = Flat(SHAPE, AWAY).normal
        self.frozen = frozen
        self.seen: list[Tensor] = []

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        check_box(rows)
        self.seen.append(rows)
        beyond = torch.stack([((row - 0.5).double() * self.normal.double()).sum() for row in rows]) - AWAY
        if self.frozen:
            beyond = torch.full_like(beyond, -AWAY)
        return Answer.of((beyond > 0).long(), 20 * torch.stack((-beyond, beyond), dim=1).float())

    @property
    def rows(self) -> Tensor:
        """All rows it was asked, in order."""
        return torch.cat(self.seen)


def images(n: int) -> Tensor:
    """Images [n,3,8,8] of class 0, all of them `AWAY` from the plane."""
    return Flat(SHAPE, AWAY).images(n)


def beyond() -> Tensor:
    """Images [4,3,8,8] of class 1, well beyond the plane and well to the side: the attacker's own."""
    sideways = 15 * (images(12)[8:] - 0.5)
    return (0.5 + sideways + 3 * AWAY * Flat(SHAPE, AWAY).normal).clamp(0, 1)


def optimum(norm: Norm) -> float:
    """The distance of the plane from every image; 1 pixel in l0."""
    length = Flat(SHAPE, AWAY).normal.abs().sum()
    return {"l2": AWAY, "linf": AWAY / float(length), "l0": 1.0}[norm]


MODES = [
    Mode("bayes-subspace", "l2", {"objective": "margin", "size": 3}, epsilon=1.25, restricted=True),
    Mode("bayes-subspace", "linf", {"objective": "margin", "size": 3}, epsilon=1.25, restricted=True),
    Mode("bayes-subspace", "l2", {"objective": "distance", "size": 3}, epsilon=2),
    Mode("cgba", factors=(1.22, 1.05)),
    Mode("cgba", targeted=True, factors=(1.2, 1.05)),
    Mode("cgba-h", factors=(1.3, 1.07)),
    Mode("one-pixel", "l0", {"population": 50}, epsilon=2, restricted=True),
    Mode("one-pixel", "l0", {"population": 50, "preset": "best1"}, epsilon=2, restricted=True),
    Mode("one-pixel-fast", "l0", epsilon=2, restricted=True),
    Mode("pixel-exhaustive", "l0", epsilon=2, restricted=True),
    Mode("random", "l0", epsilon=2, restricted=True),
    Mode("random", "l2", epsilon=1.25, restricted=True),
    Mode("random", "linf", epsilon=1.25, restricted=True),
    Mode("random", "linf"),
    Mode("random-pixels", "l0", epsilon=2, restricted=True),
    Mode("bandits", "l2", {"tile": 1}, epsilon=1.25, budget=3000, restricted=True),
    Mode("bandits", "linf", {"tile": 1}, epsilon=1.25, budget=3000, restricted=True),
    Mode("bandits", "linf", {"tile": 1}, targeted=True, epsilon=1.25, budget=4000, restricted=True),
    Mode("nes", "l2", epsilon=1.25, budget=2000, restricted=True),
    Mode("nes", "linf", epsilon=1.25, budget=2000, restricted=True),
    Mode("nes", "linf", targeted=True, epsilon=1.25, budget=2000, restricted=True),
    Mode("nes", "linf", {"top": 1}, targeted=True, epsilon=1.25, budget=2000),
    Mode("nes", "l2", {"copies": 5}, targeted=True, epsilon=2),
    Mode("zo-sign-sgd", "linf", epsilon=1.25, budget=4000, restricted=True),
    Mode("zo-sign-sgd", "linf", {"difference": "central"}, targeted=True, epsilon=1.25, budget=4000, restricted=True),
    Mode("zo-sign-sgd", "linf", {"difference": "vote"}, epsilon=1.25, restricted=True),
    Mode("sign-hunter", "l2", epsilon=1.3, own=1.267, budget=416, restricted=True),
    Mode("sign-hunter", "linf", epsilon=1.25, budget=416, restricted=True),
    Mode("sign-hunter", "linf", targeted=True, epsilon=1.25, budget=416, restricted=True),
    Mode("simba", factors=(1.35, 1.3)),
    Mode("simba", options={"basis": "pixel"}, factors=(1.35, 1.3)),
    Mode("simba", targeted=True, factors=(1.35, 1.3)),
    Mode("simba", "l2", {"step": 0.02}, epsilon=1.25, budget=1500, restricted=True),
    Mode("simba", "linf", {"basis": "pixel"}, epsilon=1.25, budget=1500, restricted=True),
    Mode("square", "l2", epsilon=1.25, restricted=True),
    Mode("square", "linf", epsilon=1.25, budget=2500, restricted=True),
    Mode("square", "linf", targeted=True, epsilon=1.25, budget=2500, restricted=True),
    Mode("boundary", factors=(1.4, 1.02)),
    Mode("boundary", targeted=True, factors=(1.15, 1.02)),
    Mode("hop-skip-jump", factors=(1.25, 1.08)),
    Mode("hop-skip-jump", targeted=True, factors=(1.22, 1.07)),
    Mode("hop-skip-jump", "linf", factors=(1.5, 1.17)),
    Mode("hop-skip-jump", "linf", targeted=True, factors=(1.5, 1.17)),
    Mode("qeba", factors=(2.5, 2.35)),
    Mode("qeba", options={"subspace": "resize"}, factors=(2.65, 2.5)),
    Mode("qeba", options={"subspace": "pca"}, targeted=True, factors=(1.3, 1.25)),
    Mode("qeba", "linf", factors=(2.4, 2.1)),
    Mode("sign-opt", factors=(1.4, 1.05)),
    Mode("sign-opt", targeted=True, factors=(1.15, 1.02)),
    Mode("sign-opt", "linf", factors=(3.1, 2.1)),
    Mode("sign-opt", "linf", targeted=True, factors=(2.4, 1.8)),
    Mode("rays", "linf", factors=(1.1, 1.02)),
    Mode("rays", "linf", epsilon=1.25, budget=1000),
    Mode("sign-flip", "linf", factors=(1.5, 1.1)),
    Mode("sign-flip", "linf", targeted=True, factors=(1.85, 1.65)),
    Mode("geoda", factors=(1.25, 1.07)),
    Mode("geoda", "linf", factors=(1.25, 1.07)),
    Mode("surfree", factors=(1.45, 1.42)),
    Mode("surfree", options={"frequencies": 1.0}, factors=(1.1, 1.01)),
    Mode("surfree", targeted=True, factors=(1.22, 1.2)),
    Mode("tangent", factors=(1.25, 1.06)),
    Mode("tangent", options={"ratio": 1.1}, factors=(1.25, 1.07)),
    Mode("tangent", targeted=True, factors=(1.2, 1.06)),
    Mode("waterfill", factors=(1.2, 1.05)),
    Mode("waterfill", targeted=True, factors=(1.2, 1.05)),
    Mode("waterfill", "linf", factors=(1.3, 1.07)),
    Mode("waterfill", "linf", targeted=True, factors=(1.3, 1.07)),
]
