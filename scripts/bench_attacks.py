"""Every attack beside its blind control and its peers: one table a threat model, all through the same oracle.

    python scripts/bench_attacks.py                                        50 images, 5000 queries each: about two hours
    python scripts/bench_attacks.py --images 20 --budget 1000 --only l2

The images are the first N of the real CIFAR-10 file that the ResNet-20 of the data folder classifies correctly. A cell is the
median distance after so many queries (a failure counts as infinite), or, at a fixed radius, how many images succeeded by then.

Peers are other people's code, unchanged: foolbox by our own adapter; ART 1.20.1 and torchattacks 3.5.1 are installed without
their dependencies into build/peers, where only this script looks. Their rows pass our oracle as an attack's do, within the
same budget; what they draw from random states of their own (ART's HopSkipJump) differs from run to run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_cgba import load

from robustbox import AttackResult, registry, run_attack
from robustbox.attacks.guest import Ask, Guest, Randomness
from robustbox.protocol import NORMS, Attack, Norm, Search, Task
from robustbox.statistics import median, wilson

PEERS = Path(__file__).resolve().parents[1] / "build/peers"
PACKAGES = {"art": ["adversarial-robustness-toolbox==1.20.1", "six"], "torchattacks": ["torchattacks==3.5.1"]}
MARKS = (50, 100, 250, 500, 1000, 2000, 5000)
CLASSES = 10


@dataclass(frozen=True)
class Contest:
    """A threat model and who meets in it: names with options, or peers."""

    norm: Norm
    epsilon: float | None
    knowledge: str
    sides: Mapping[str, Callable[[], Attack]]


def ours(name: str, **options: Any) -> Callable[[], Attack]:
    """One of the registered attacks, foolbox's included."""
    return lambda: registry.load("attacks", name)(**options)


def contests() -> dict[str, Contest]:
    """All that is measured: each attack, its control, its peers."""
    l2 = {
        "cgba": ours("cgba"),
        "cgba-h": ours("cgba-h"),
        "random (control)": ours("random"),
        "foolbox HopSkipJump": ours("foolbox:HopSkipJumpAttack", initial_gradient_eval_steps=30),
        "foolbox Boundary": ours("foolbox:BoundaryAttack"),
        "ART HopSkipJump": lambda: Peer(art_hop_skip_jump),
    }
    labels = {
        "bayes-subspace distance": ours("bayes-subspace", objective="distance"),
        "bayes-subspace label (paper)": ours("bayes-subspace", objective="label"),
        "  its control: random": ours("bayes-subspace", acquisition="random"),
        "  its control: sobol": ours("bayes-subspace", acquisition="sobol"),
        "random (control)": ours("random"),
    }
    scores = {
        "bayes-subspace margin": ours("bayes-subspace", objective="margin"),
        "  its control: random": ours("bayes-subspace", acquisition="random"),
        "ART Square": lambda: Peer(art_square),
    }
    pixels = {
        "one-pixel-fast": ours("one-pixel-fast"),
        "one-pixel paper": ours("one-pixel", preset="paper"),
        "one-pixel best1": ours("one-pixel", preset="best1"),
        "pixel-exhaustive (control)": ours("pixel-exhaustive"),
        "random-pixels (control)": ours("random-pixels"),
        "torchattacks OnePixel": lambda: Peer(torchattacks_one_pixel),
        "ART Pixel": lambda: Peer(art_pixel),
    }
    return {
        "l2": Contest("l2", None, "label", l2),
        "linf-labels": Contest("linf", 0.03, "label", labels),
        "linf-scores": Contest("linf", 0.03, "score", scores),
        "l0": Contest("l0", 1, "score", pixels),
    }


@dataclass(frozen=True)
class Peer(Attack):
    """Another library's attack on one image, as a function of what asks for answers."""

    call: Callable[[Ask, Task], object]
    name: ClassVar[str] = "peer"
    norms: ClassVar[tuple[Norm, ...]] = NORMS

    def search(self, task: Task) -> Search:
        return Guest(lambda ask: void(self.call(ask, task)), Randomness(task.generator, with_numpy=True)).search()


def void(_: object) -> None:
    """What a peer returns is not needed: what it asked stands in the books."""


def predict(ask: Ask) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """The black box as ART takes it: from rows to probabilities, one-hot where only labels are granted."""

    def probabilities(rows: NDArray[Any]) -> NDArray[np.float32]:
        answer = ask(torch.from_numpy(np.asarray(rows, dtype=np.float32)).clamp(0, 1))
        scores = nn.functional.one_hot(answer.labels, CLASSES) if answer.scores is None else answer.scores
        found: NDArray[np.float32] = scores.float().numpy()
        return found

    return probabilities


def art(name: str, ask: Ask, task: Task, **options: Any) -> object:
    """One of ART's evasion attacks on one image."""
    install("art")
    from art.attacks import evasion
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    model = BlackBoxClassifierNeuralNetwork(predict(ask), tuple(task.image.shape), CLASSES, clip_values=(0.0, 1.0))
    attack = getattr(evasion, name)(model, verbose=False, **options)
    return attack.generate(task.image[None].numpy(), y=np.eye(CLASSES, dtype=np.float32)[[task.label]])


def art_hop_skip_jump(ask: Ask, task: Task) -> object:
    """ART's HopSkipJump in l2, first 30 directions a step, until the budget ends it."""
    return art("HopSkipJump", ask, task, norm=2, max_iter=1000, init_eval=30)


def art_square(ask: Ask, task: Task) -> object:
    """ART's Square in linf."""
    return art("SquareAttack", ask, task, norm=np.inf, eps=task.epsilon, max_iter=10_000)


def art_pixel(ask: Ask, task: Task) -> object:
    """ART's pixel attack by differential evolution, one pixel."""
    return art("PixelAttack", ask, task, th=1, es=1, max_iter=100)


def torchattacks_one_pixel(ask: Ask, task: Task) -> object:
    """torchattacks' OnePixel with a population of 400 and 20 steps."""
    install("torchattacks")
    from torchattacks import OnePixel

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.where = nn.Parameter(torch.zeros(1), requires_grad=False)  # it looks for the device here

        def forward(self, rows: Tensor) -> Tensor:
            scores = ask(rows.clamp(0, 1)).scores
            assert scores is not None
            return scores.log()

    attack = OnePixel(Asking().eval(), pixels=1, steps=20, popsize=400)
    return attack(task.image[None], torch.tensor([task.label]))


def install(package: str) -> None:
    """Put a peer's package where only this script finds it."""
    if not (PEERS / package).is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
        subprocess.run([*pip, *PACKAGES[package]], check=True)
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))


def row(side: str, result: AttackResult, marks: list[int]) -> list[str]:
    """One line of the table."""
    n, hits = len(result), int(result.success.sum())
    low, high = wilson(hits, n)
    if result.epsilon is None:
        cells = [f"{median(result.distance_at(mark)):.3f}" for mark in marks]
    else:
        cells = [str(int(result.success_at(mark).sum())) for mark in marks]
    first = median(np.where(result.success, result.first_success, np.inf))
    errors = sum(error is not None for error in result.errors)
    speed = f"{result.meta['rows_per_second']:,.0f}" + (f" ({errors} errors)" if errors else "")
    return [
        side,
        f"{hits} of {n}",
        f"{low:.2f}-{high:.2f}",
        *cells,
        f"{first:,.0f}",
        f"{result.queries.mean():,.0f}",
        speed,
    ]


def main() -> None:
    everything = contests()
    parser = argparse.ArgumentParser(description="Every attack beside its control and its peers.")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--budget", type=int, default=5000)
    parser.add_argument("--only", nargs="+", choices=list(everything), default=list(everything))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model, images, labels, _ = load(args.images)
    marks = [mark for mark in MARKS if mark < args.budget] + [args.budget]
    for name in args.only:
        contest = everything[name]
        radius = "least distance" if contest.epsilon is None else f"within {contest.epsilon:g}"
        title = f"{contest.norm}, {radius}, attacker sees {contest.knowledge}s; {args.images} images, seed {args.seed}"
        table = Table("side", "success", "95 %", *map(str, marks), "first", "rows", "rows/s", title=title)
        for side, attack in contest.sides.items():
            setting = {"epsilon": contest.epsilon, "budget": args.budget, "knowledge": contest.knowledge}
            result = run_attack(model, images, labels, attack(), contest.norm, seed=args.seed, **setting)
            table.add_row(*row(side, result, marks))
            print(f"{name}: {side} done", file=sys.stderr, flush=True)
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
