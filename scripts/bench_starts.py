"""What rows to begin from are worth: adversarials of a network of the attacker's own, carried over to one that is only asked.

    python scripts/bench_starts.py                              four contests of 50 images on each network: half an hour
    python scripts/bench_starts.py --only towards --images 10 --skip 200
    python scripts/bench_starts.py --cosines --skip 100 --images 24

The attacker's own network is the other ResNet-20 (the data folder's and the zoo's: other weights, other training), on which
foolbox's iterated gradient with momentum (Dong et al., CVPR 2018), each gradient a mean over noisy copies, makes a row for each
image, within --epsilon of it. The asked network answers labels. `carried over` counts those rows that reach the goal there as
they are; each attack runs with `starts=` and without. The images are those of `bench_waterfill.py`. Cells are medians; the last
column is the geometric mean over images and marks of the distance without the rows over that with them, with a 95 % bootstrap
interval over images.
With --cosines, what more the own network could tell: the cosine of its normals (white-box, means over noisy copies too) with
those of the asked one, without their part along the ray, at points that `waterfill` reaches; medians over images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from foolbox import PyTorchModel
from foolbox.attacks import L2MomentumIterativeFastGradientMethod, LinfMomentumIterativeFastGradientMethod
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_waterfill import curve, inputs, paired
from eval_normals import boundary, normal

from robustbox import run_attack
from robustbox.statistics import median

MARKS = (20, 50, 100, 250, 500, 1000)
OTHER = {"cifar10": "zoo", "zoo": "cifar10"}
"""The network that the attacker owns, by the one that it asks."""
RADII = {"l2": 4.0, "linf": 0.08}
"""Of the rows made on the attacker's network: longer ones carry over more often, and a line search shortens them."""
STEPS, COPIES, NOISE = 50, 4, 0.05
RIVALS = {("l2", False): "cgba", ("l2", True): "cgba-h", ("linf", False): "rays", ("linf", True): "sign-flip"}
CONTESTS = {
    "l2": ("l2", False),
    "linf": ("linf", False),
    "towards-l2": ("l2", True),
    "towards-linf": ("linf", True),
}


class Noisy(nn.Module):
    """The mean of a network's logits over noisy copies of a batch: its gradients carry over better."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> Tensor:
        return torch.stack([self.network(rows + NOISE * torch.randn_like(rows)) for _ in range(COPIES)]).mean(0)


def made(owned: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None, norm: str, epsilon: float) -> Tensor:
    """White-box adversarials of the attacker's own network [N,C,H,W], whether they fool it or not."""
    torch.manual_seed(0)
    kind = L2MomentumIterativeFastGradientMethod if norm == "l2" else LinfMomentumIterativeFastGradientMethod
    criterion = Misclassification(labels) if targets is None else TargetedMisclassification(targets)
    _, rows, _ = kind(steps=STEPS)(
        PyTorchModel(Noisy(owned).eval(), bounds=(0, 1)), images, criterion, epsilons=epsilon
    )
    return rows.clamp(0, 1)


def contest(asked: str, norm: str, targeted: bool, args: argparse.Namespace) -> None:
    """Print the table of one network, norm and kind of goal."""
    model, images, labels, pool = inputs(asked, args.skip, args.images)
    owned = inputs(OTHER[asked], 0, 1)[0]
    targets = (labels + 1) % 10 if targeted else None
    aim: dict[str, Any] = {} if targets is None else {"targets": targets, "pool": pool}
    rows = made(owned, images, labels, targets, norm, args.epsilon or RADII[norm])
    with torch.no_grad():
        answers = model(rows).argmax(1)
    carried = int((answers != labels if targets is None else answers == targets).sum())
    print(f"\n### {asked}, {norm}{', towards a target' * targeted}: {carried} of {len(images)} rows carried over\n")
    head = ["side", *map(str, MARKS), "without the rows over with them, paired (95 %)"]
    print("\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head))))
    rival = RIVALS[norm, targeted]
    for attack in ["waterfill"] + [rival] * (rival != "rays"):  # RayS begins at the image
        curves = []
        for starts in (None, rows):
            result = run_attack(model, images, labels, attack, norm, budget=MARKS[-1], starts=starts, **aim)
            curves.append(curve({"traces": result.traces}, MARKS))
            pair = "" if starts is None else "{:.3f} ({:.3f}-{:.3f})".format(*paired(curves[1], curves[0]))
            cells = [f"{median(curves[-1][:, k]):.3g}" for k in range(len(MARKS))]
            side = f"`{attack}`" if starts is None else "with the rows"
            print("| " + " | ".join([side, *cells, pair]) + " |", flush=True)


def cosines(asked: str, args: argparse.Namespace) -> None:
    """Print how alike the normals of the two networks are."""
    model, images, labels, _ = inputs(asked, args.skip, args.images)
    owned = Noisy(inputs(OTHER[asked], 0, 1)[0])
    torch.manual_seed(0)
    for budget in (100, 300, 1000):
        result = run_attack(model, images, labels, "waterfill", "l2", budget=budget)
        each = []
        for image, label, end in zip(images, labels.tolist(), result.adversarials, strict=True):
            point, _ = boundary(model, image, label, end)
            each.append(float((normal(model, image, label, point) * normal(owned, image, label, point)).sum()))
        print(f"{asked}, {len(images)} images, {budget} queries: cosine {median(each):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Attacks with rows to begin from, and without.")
    parser.add_argument("--only", nargs="+", default=list(CONTESTS), help="contests whose names begin so")
    parser.add_argument("--asked", nargs="+", choices=list(OTHER), default=list(OTHER))
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--cosines", action="store_true", help="how alike the normals of the two networks are")
    parser.add_argument("--epsilon", type=float, help="radius of the rows that are made; default 4 in l2, 0.08 in linf")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for asked in args.asked:
        if args.cosines:
            cosines(asked, args)
            continue
        for name, (norm, targeted) in CONTESTS.items():
            if name.startswith(tuple(args.only)):
                contest(asked, norm, targeted, args)


if __name__ == "__main__":
    main()
