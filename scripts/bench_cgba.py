"""CGBA against its authors' code: median l2 distance at fixed numbers of queries, on real CIFAR-10 images and a ResNet-20.

    python scripts/bench_cgba.py                                   ours beside the recorded figures of the authors' code
    python scripts/bench_cgba.py --reference PATH --images 20      the authors' code in the same process (a checkout of it)
    python scripts/bench_cgba.py --attacks cgba cgba-h random --levels 256
    python scripts/bench_cgba.py --attacks cgba cgba-h --targeted --images 20

The images are the first N of the file that the model classifies correctly; a failure counts as infinite distance; every
query counts, the start search included. Targets are the class after the true one, targeted starts come from the images that
follow the N. Data and weights are looked for in ROBUSTBOX_DATA, else in ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustbox import run_attack
from robustbox.models.networks import CifarResNet

QUERIES = (250, 500, 1000, 2000)
RECORDED = {"full": (0.792, 0.453, 0.244, 0.155), "dct": (1.033, 0.641, 0.436, 0.376)}
"""The authors' code, untargeted, float API, first 100 images, at QUERIES; dct with factor 4."""


def main() -> None:
    parser = argparse.ArgumentParser(description="CGBA against its authors' code on real CIFAR-10 images.")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--attacks", nargs="+", default=["cgba"])
    parser.add_argument("--subspace", default="full", choices=["full", "dct", "fft", "grid", "tiles"])
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--levels", type=int)
    parser.add_argument("--targeted", action="store_true")
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' code")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model, images, labels, pool = load(args.images)
    targets = (labels + 1) % 10 if args.targeted else None
    marks = [q for q in QUERIES if q <= args.budget]
    table = Table("side", "images", *map(str, marks), "rows/s")

    def show(side: str, distances: NDArray[np.float64], rows: int, seconds: float) -> None:
        medians = [f"{x:.3f}" for x in np.median(distances, axis=0)]
        table.add_row(side, str(len(distances)), *medians, f"{rows / seconds:,.0f}")

    for name in args.attacks:
        options = {"subspace": args.subspace, "factor": args.factor}
        start = time.perf_counter()
        result = run_attack(
            model,
            images,
            labels,
            attack=name,
            attack_options=options,
            budget=args.budget,
            targets=targets,
            levels=args.levels,
            seed=args.seed,
            pool=pool if args.targeted else None,
        )
        seconds = time.perf_counter() - start
        curve = np.stack([result.distance_at(q) for q in marks], axis=1)
        show(f"robustbox {name}, {args.subspace}", curve, sum(result.ledger.values()), seconds)
    if args.reference is not None:
        if args.targeted or args.levels or args.subspace not in RECORDED:
            parser.error("--reference compares untargeted runs of the float API, in the full space or dct")
        factor = args.factor if args.subspace == "dct" else 1
        start = time.perf_counter()
        curve = np.stack([reference(args.reference, model, x, marks, factor, args.seed) for x in images])
        seconds = time.perf_counter() - start
        show(f"authors' code, {args.subspace}", curve, len(images) * args.budget, seconds)
    if not args.targeted and args.levels is None and args.subspace in RECORDED:
        figures = [f"{x:.3f}" for x in RECORDED[args.subspace][: len(marks)]]
        table.add_row(f"authors' code, {args.subspace}, recorded", "100", *figures, "")
    Console().print(table)


def load(n: int) -> tuple[CifarResNet, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The ResNet-20, the first n images that it classifies correctly, their labels, and a pool of 500 that follow them."""
    data = Path(os.environ.get("ROBUSTBOX_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
    if not data.is_dir():
        sys.exit(f"no data in {data}: set ROBUSTBOX_DATA to the folder that holds cifar10_test_dev.npz and weights/")
    model = CifarResNet()
    model.load_state_dict(load_file(data / "weights/cifar10_resnet20.safetensors"))
    model.eval()
    with np.load(data / "cifar10_test_dev.npz") as archive:
        images = torch.from_numpy(archive["images"][: 2 * n + 1000]).permute(0, 3, 1, 2).float().div(255).contiguous()
        labels = torch.from_numpy(archive["labels"][: 2 * n + 1000]).long()
    with torch.no_grad():
        right = torch.cat([model(batch).argmax(1) for batch in images.split(100)]) == labels
    images, labels = images[right], labels[right]
    return model, images[:n], labels[:n], (images[n : n + 500], labels[n : n + 500])


class SpentError(Exception):
    """The reference has asked its last query."""


class Counter:
    """The model as the authors' code sees it: normalised rows; notes the nearest adversarial row after each query."""

    def __init__(self, model: CifarResNet, image: Tensor, budget: int) -> None:
        self.model, self.image, self.budget = model, image, budget
        self.label = int(model(image[None]).argmax())
        self.curve: list[float] = []

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows.detach() * self.model.normalize.std + self.model.normalize.mean
        logits: Tensor = self.model(rows)
        far = torch.linalg.vector_norm((rows - self.image).flatten(1), dim=1)
        for d in torch.where(logits.argmax(1) != self.label, far, torch.inf).tolist():
            self.curve.append(min(d, self.curve[-1]) if self.curve else d)
        if len(self.curve) >= self.budget:
            raise SpentError
        return logits


@torch.no_grad()
def reference(
    path: Path, model: CifarResNet, image: Tensor, marks: Sequence[int], factor: float, seed: int
) -> list[float]:
    """Distances of the authors' CGBA on one image at the query numbers of `marks`."""
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import proposed_attack  # type: ignore[import-not-found]

    mean, std = model.normalize.mean, model.normalize.std
    counter: Any = Counter(model, image, max(marks))
    source, low, high = ((x - mean) / std for x in (image, torch.zeros_like(image), torch.ones_like(image)))
    attack = proposed_attack.Proposed_attack(
        counter,
        source[None],
        mean.flatten().tolist(),
        std.flatten().tolist(),
        low[None],
        high[None],
        dim_reduc_factor=factor,
        attack_method="CGBA",
        iteration=10**6,
        verbose_control="No",
    )
    counter.curve.clear()  # the label look-up of the constructor is free, as in its own books
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with suppress(SpentError):
            attack.Attack()
    return [counter.curve[q - 1] for q in marks]


if __name__ == "__main__":
    main()
