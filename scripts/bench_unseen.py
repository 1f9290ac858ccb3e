"""`waterfill` on networks of other kinds than those it was made on, trained here in minutes, beside the best of the others.

    python scripts/bench_unseen.py                        all networks, l2 and linf: half an hour, then from what was kept
    python scripts/bench_unseen.py --only vit --norm linf
    python scripts/bench_unseen.py --norm l2 --sides waterfill "without learning"

An MLP, a vision transformer, a network of average pools, two that are trained against l2 attacks (FGM), and, held out, a
mixer and a LeNet. They are trained on the data folder's images from number 1500 on, for a fixed number of steps; the attacks
ask the first images before those that they classify correctly. `HELD_OUT` are the networks on which nothing was ever chosen.
Weights and results are kept in --out. Cells are medians, in brackets ours over theirs; the last column is as in
`bench_waterfill.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_waterfill import DCT_2, MARKS, OURS, Side, curve, first, paired, removed
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_cifar10 import data_folder

from robustbox import run_attack
from robustbox.statistics import median

APART = 1500
"""Images before this one are attacked, the others trained on."""
HELD_OUT = ("mixer", "lenet")
LESS: dict[str, Side] = {"without learning": (OURS, {"learn": False}), "without the colours' prior": (OURS, {})}
"""Ideas that the four networks of the ablation leave in doubt."""
SIDES: dict[str, dict[str, Side]] = {
    "l2": {name: (name, {}) for name in (OURS, "cgba", "hop-skip-jump")} | DCT_2 | LESS,
    "linf": {name: (name, {}) for name in (OURS, "rays", "hop-skip-jump")} | {"without the race": (OURS, {})},
}


class Transformer(nn.Module):
    """A vision transformer over patches of 4 x 4 pixels."""

    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, rows: Tensor) -> Tensor:
        patches: Tensor = self.patches(2 * rows - 1).flatten(2).mT + self.places
        logits: Tensor = self.head(self.layers(patches).mean(1))
        return logits


class Mixing(nn.Module):
    """A layer of an MLP-mixer."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.across = nn.Sequential(nn.Linear(places, places), nn.GELU(), nn.Linear(places, places))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, patches: Tensor) -> Tensor:
        patches = patches + self.across(self.norms[0](patches).mT).mT
        mixed: Tensor = patches + self.within(self.norms[1](patches))
        return mixed


class Mixer(nn.Module):
    """An MLP-mixer over patches of 4 x 4 pixels."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.Sequential(*(Mixing(64, width) for _ in range(4)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.patches(2 * rows - 1).flatten(2).mT).mean(1))
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.GELU(), nn.Linear(300, 100), nn.GELU(), nn.Linear(100, 10)
    )


def strided() -> nn.Module:
    convolutions = (nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10))


def lenet() -> nn.Module:
    first_part = (nn.Conv2d(1, 6, 5, 1, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2))
    return nn.Sequential(*first_part, nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 10))


def pooled() -> nn.Module:
    def block(given: int, made: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(given, made, 3, 1, 1, bias=False), nn.BatchNorm2d(made), nn.SiLU(), nn.AvgPool2d(2)

    return nn.Sequential(*block(3, 24), *block(24, 48), *block(48, 96), nn.Flatten(), nn.Linear(96 * 16, 10))


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], float, int]] = {
    "mlp": ("mnist", mlp, 0.0, 4000),
    "robust-cnn": ("mnist", strided, 1.0, 2000),
    "vit": ("cifar10", Transformer, 0.0, 700),
    "pooled": ("cifar10", pooled, 0.0, 1200),
    "robust-pooled": ("cifar10", pooled, 0.25, 800),
    "mixer": ("cifar10", Mixer, 0.0, 900),
    "lenet": ("mnist", lenet, 0.0, 2500),
}
"""Data, architecture, the l2 radius of the attack trained against, and steps of 128 images."""


def train(model: nn.Module, images: Tensor, labels: Tensor, radius: float, steps: int) -> None:
    """AdamW, the rate falling to 0; colour images are mirrored and moved by up to 3 pixels."""
    draws = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,), generator=draws)
        rows, truth = images[chosen], labels[chosen]
        if rows.shape[1] == 3:
            down, right, mirrored = torch.randint(-3, 4, (3,), generator=draws).tolist()
            rows = torch.roll(rows.flip(3) if mirrored > 0 else rows, (down, right), (2, 3))
        if radius:
            model.eval()
            rows.requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(model(rows), truth), rows)
            rows = (rows.detach() + radius * F.normalize(slope.flatten(1)).view_as(rows)).clamp(0, 1)
        model.train()
        optimiser.zero_grad()
        F.cross_entropy(model(rows), truth).backward()
        optimiser.step()
        rates.step()


def inputs(name: str, out: Path, n: int) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A network, trained once, n images that it classifies correctly with their labels, and its accuracy."""
    data, make, radius, steps = NETWORKS[name]
    with np.load(data_folder() / f"{data}_test_dev.npz") as archive:
        pixels, labels = archive["images"], torch.from_numpy(archive["labels"]).long()
    rows = torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, 3, 1).copy()).float().div(255)
    torch.manual_seed(0)
    model, file = make(), out / f"{name}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        train(model, rows[APART:], labels[APART:], radius, steps)
        save_file(model.state_dict(), file)
    images, truth, _ = first(model, rows[:APART], labels[:APART], 0, n)
    with torch.no_grad():
        accuracy = float((model(rows[:APART]).argmax(1) == labels[:APART]).float().mean())
    return model, images, truth, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="waterfill on networks of other kinds.")
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--norm", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--sides", nargs="+", help="these sides alone")
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--budget", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_unseen"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    marks = [mark for mark in MARKS if mark <= args.budget]
    for name in args.only:
        model, images, labels, accuracy = inputs(name, args.out, args.images)
        for norm in args.norm:
            held = ", held out" if name in HELD_OUT else ""
            table = Table("side", *map(str, marks), "distance over ours, paired (95 %)")
            table.title = f"{name}{held} ({100 * accuracy:.0f} % right), {norm}, {len(images)} images"
            ours = None
            for side, (attack, options) in SIDES[norm].items():
                if args.sides and side not in args.sides:
                    continue
                run = attacked(args, (name, norm, side), model, images, labels, attack, options)
                far = curve(run, marks)
                ours = far if ours is None else ours
                cells = [
                    f"{median(far[:, k]):.3g} ({median(ours[:, k]) / median(far[:, k]):.2f})" for k in range(len(marks))
                ]
                table.add_row(side, *cells, "{:.3f} ({:.3f}-{:.3f})".format(*paired(ours, far)))
            Console(width=130).print(table)


def attacked(
    args: argparse.Namespace,
    key: tuple[str, str, str],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: str,
    options: Any,
) -> dict[str, Any]:
    """A run's traces, kept in a file."""
    file: Path = args.out / f"{'-'.join(key)}-{args.images}x{args.budget}.json"
    if not file.exists():
        with removed(key[2]):
            result = run_attack(
                model, images, labels, attack, key[1], budget=args.budget, attack_options=options, seed=0
            )
        file.write_text(json.dumps({"traces": result.traces}))
    kept: dict[str, Any] = json.loads(file.read_text())
    return kept


if __name__ == "__main__":
    main()
