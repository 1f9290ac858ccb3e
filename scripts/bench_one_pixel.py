"""One-pixel attacks against torchattacks' OnePixel: success and rows a second on real CIFAR-10 images and a ResNet-20.

    python scripts/bench_one_pixel.py                              30 images, 8,000 rows an image
    python scripts/bench_one_pixel.py --images 10 --pixels 3 --sides fast random-pixels

The images are the first N of the file that the model classifies correctly; the model counts the rows that it is asked.
torchattacks runs with popsize 400 and 20 steps: 8,420 rows an image unless it stops before, more than the others get. It is
no dependency: the script installs it, alone, into build/peers. Data and weights are looked for in ROBUSTBOX_DATA, else in
../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_cgba import load

from robustbox import run_attack
from robustbox.attacks.one_pixel import OnePixel
from robustbox.attacks.one_pixel_fast import OnePixelFast
from robustbox.attacks.pixels import PixelExhaustive, RandomPixels
from robustbox.protocol import Attack
from robustbox.statistics import median, wilson

PEERS = Path(__file__).resolve().parents[1] / "build/peers"
PEER = "torchattacks==3.5.1"
POPSIZE, STEPS = 400, 20
MARKS = (100, 500, 2000, 8000)


def main() -> None:
    parser = argparse.ArgumentParser(description="One-pixel attacks against torchattacks on real CIFAR-10 images.")
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--budget", type=int, default=8000)
    parser.add_argument("--pixels", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", help="default: all")
    args = parser.parse_args()

    attacks: dict[str, Attack] = {
        "fast": OnePixelFast(pixels=args.pixels),
        "paper": OnePixel(pixels=args.pixels),
        "paper, margin": OnePixel(pixels=args.pixels, loss="margin"),
        "best1": OnePixel(pixels=args.pixels, preset="best1"),
        "random-pixels": RandomPixels(pixels=args.pixels),
        "random-pixels, corners": RandomPixels(pixels=args.pixels, colours="corners"),
    }
    if args.pixels == 1:
        attacks["pixel-exhaustive"] = PixelExhaustive()
    sides = args.sides or ["torchattacks", *attacks]
    if unknown := set(sides) - {"torchattacks", *attacks}:
        parser.error(f"unknown sides: {', '.join(sorted(unknown))}; known: torchattacks, {', '.join(attacks)}")

    model, images, labels, _ = load(args.images)
    counting = Counting(model)
    marks = [mark for mark in MARKS if mark < args.budget]
    table = Table("side", "success", "95 %", *(f"by {mark:,}" for mark in marks), "median rows", "rows", "rows/s")
    for side in sides:
        counting.rows, start = 0, time.process_time()
        if side == "torchattacks":
            first = torchattacks(counting, images, labels, args.pixels, args.seed)
        else:
            result = run_attack(
                counting, images, labels, attacks[side], "l0", budget=args.budget, knowledge="score", seed=args.seed
            )
            assert sum(result.ledger.values()) == counting.rows
            first = np.where(result.success, result.first_success, np.inf)
        seconds = time.process_time() - start
        hits, n = int(np.isfinite(first).sum()), len(first)
        low, high = wilson(hits, n)
        table.add_row(
            side,
            f"{hits} of {n}",
            f"{low:.2f}-{high:.2f}",
            *(str(int((first <= mark).sum())) for mark in marks),
            f"{median(first):,.0f}",
            f"{counting.rows:,}",
            f"{counting.rows / seconds:,.0f}",
        )
    Console(width=120).print(table)


class Counting(nn.Module):
    """The model, and how many rows it was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.rows = model, 0
        self.eval()

    def forward(self, rows: Tensor) -> Tensor:
        self.rows += len(rows)
        logits: Tensor = self.model(rows)
        return logits


def torchattacks(model: Counting, images: Tensor, labels: Tensor, pixels: int, seed: int) -> NDArray[np.float64]:
    """Rows after which torchattacks' OnePixel ended with an adversarial image, one an image; inf where it has none."""
    if not (PEERS / "torchattacks").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS), PEER]
        subprocess.run(pip, check=True)
    sys.path.append(str(PEERS))
    from torchattacks import OnePixel as Peer  # type: ignore[import-not-found]

    np.random.seed(seed)  # the peer draws from the global stream
    attack: Any = Peer(model, pixels=pixels, steps=STEPS, popsize=POPSIZE)
    first = np.full(len(images), np.inf)
    for i, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
        before = model.rows
        adversarial = attack(image, label)
        spent = model.rows - before
        with torch.no_grad():
            if model.model(adversarial).argmax(dim=1) != label:
                first[i] = spent
    return first


if __name__ == "__main__":
    main()
