"""Bayesian search in a subspace beside its blind controls: success within 10, 50, 100, 200, ... queries, on real networks.

    python scripts/bench_bayes.py                      every objective and acquisition in every setting; resumes --out
    python scripts/bench_bayes.py --quick              10 images, expected improvement only
    python scripts/bench_bayes.py --settings cifar10:linf:0.03 --objectives margin distance
    python scripts/bench_bayes.py --cost               our own time a query against a plain botorch loop, no network

Settings are DATA:NORM:EPSILON. All sides search the same subspace (the attack's defaults) on the same images, the first N
of the file that the network classifies correctly. Shares come with 95 % Wilson intervals; beside the share at the full
budget stands the paired difference to `random`, with a 95 % bootstrap interval over images and McNemar's exact p. Data and
weights are looked for in ROBUSTBOX_DATA, else in ../shared/data beside the checkout; every finished side is kept in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustbox import run_attack
from robustbox.attacks.bayes_subspace import BayesSubspace
from robustbox.models.networks import CifarResNet
from robustbox.statistics import wilson

SETTINGS = (
    "mnist:linf:0.3",
    "mnist:linf:0.15",
    "mnist:linf:0.1",
    "mnist:linf:0.05",
    "cifar10:linf:0.03",
    "cifar10:l2:0.5",
    "cifar10:l2:1.0",
)
QUERIES = (10, 50, 100, 200, 500, 1000)
OBJECTIVES = ("label", "margin", "distance")
ACQUISITIONS = ("ei", "poi", "pm", "ucb")


class MnistNet(nn.Module):
    """The MNIST network of satyanshukla/bayes_attack: four convolutions, three dense layers; images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width, pooled in ((1, 32, False), (32, 32, True), (32, 64, False), (64, 64, True)):
            layers += [nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pooled else []
        self.features = nn.Sequential(*layers)
        self.fc1, self.fc2, self.fc3 = nn.Linear(1024, 200), nn.Linear(200, 200), nn.Linear(200, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n,10] of images [n,1,28,28]."""
        x = F.relu(self.fc1(self.features(images).flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description="Bayesian search in a subspace beside its blind controls.")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--acquisitions", nargs="+", default=ACQUISITIONS, choices=ACQUISITIONS)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_bayes.json"))
    parser.add_argument("--quick", action="store_true", help="10 images, expected improvement only")
    parser.add_argument("--cost", action="store_true", help="our own time a query against a plain botorch loop")
    args = parser.parse_args()
    if args.cost:
        return cost()
    if args.quick:
        args.images, args.acquisitions = min(args.images, 10), ("ei",)
    done: dict[str, list[int]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    sides = [("", "random"), ("", "sobol"), *((o, a) for o in args.objectives for a in args.acquisitions)]
    for setting in args.settings:
        found: dict[str, NDArray[np.int64]] = {}
        for objective, acquisition in sides:
            side = f"{objective} {acquisition}".strip()
            key = f"{setting} {side} {args.images} {args.budget} {args.seed}"
            if key not in done:
                start = time.perf_counter()
                done[key] = first_successes(setting, objective, acquisition, args.images, args.budget, args.seed)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(done, indent=0))
                print(f"{key}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
            found[side] = np.array(done[key])
        Console(width=140).print(table(setting, found, args.budget))


def first_successes(setting: str, objective: str, acquisition: str, n: int, budget: int, seed: int) -> list[int]:
    """The query of each image's first success, 0 where there was none."""
    data, norm, epsilon = setting.split(":")
    model, images, labels = load(data, n)
    attack = BayesSubspace(objective=objective or None, acquisition=acquisition)  # type: ignore[arg-type]
    result = run_attack(model, images, labels, attack, norm=norm, epsilon=float(epsilon), budget=budget, seed=seed)
    if any(result.errors):
        raise RuntimeError(f"{setting} {objective} {acquisition}: {next(filter(None, result.errors))}")
    # A query of several rows may end beyond the success: only the row that succeeded counts here.
    return [int(first) for first in result.first_success]


def load(data: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and the first n images that it classifies correctly, with their labels."""
    folder = Path(os.environ.get("ROBUSTBOX_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
    if not folder.is_dir():
        sys.exit(f"no data in {folder}: set ROBUSTBOX_DATA to the folder that holds {data}_test_dev.npz and weights/")
    model: nn.Module = MnistNet() if data == "mnist" else CifarResNet()
    weights = "mnist_cnn_bayes_attack" if data == "mnist" else "cifar10_resnet20"
    model.load_state_dict(load_file(folder / f"weights/{weights}.safetensors"))
    model.eval()
    with np.load(folder / f"{data}_test_dev.npz") as archive:
        pixels, labels = (
            torch.from_numpy(archive["images"][: 2 * n]),
            torch.from_numpy(archive["labels"][: 2 * n]).long(),
        )
    images = (pixels[:, None] if data == "mnist" else pixels.permute(0, 3, 1, 2)).float().div(255).contiguous()
    with torch.no_grad():
        right = torch.cat([model(batch).argmax(1) for batch in images.split(50)]) == labels
    return model, images[right][:n], labels[right][:n]


def table(setting: str, found: dict[str, NDArray[np.int64]], budget: int) -> Table:
    """Success of every side of a setting at the query numbers of QUERIES."""
    marks = [q for q in QUERIES if q <= budget]
    n = len(found["random"])
    made = Table("side", *(f"{q} queries" for q in marks), "minus random", "McNemar", title=f"{setting}, {n} images")
    control = within(found["random"], marks[-1])
    for side, first in found.items():
        cells = []
        for q in marks:
            hits = int(within(first, q).sum())
            low, high = wilson(hits, n)
            cells.append(f"{hits / n:.0%} ({low:.0%} to {high:.0%})")
        made.add_row(side, *cells, *paired(within(first, marks[-1]), control))
    return made


def within(first: NDArray[np.int64], queries: int) -> NDArray[np.bool_]:
    """Which images were won within a number of queries."""
    return (first > 0) & (first <= queries)


def paired(side: NDArray[np.bool_], control: NDArray[np.bool_]) -> tuple[str, str]:
    """The difference of shares on the same images with its bootstrap interval, and McNemar's exact p."""
    from scipy.stats import binomtest

    gained, lost = int((side & ~control).sum()), int((control & ~side).sum())
    differences = side.astype(float) - control
    drawn = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return f"{differences.mean():+.0%} ({low:+.0%} to {high:+.0%})", f"+{gained} -{lost}, p = {p:.2g}"


def cost(observations: int = 100, dim: int = 192, repeats: int = 3) -> None:
    """Our optimiser's time a query beside a plain botorch loop's, with so many observations of a linear function."""
    from botorch.acquisition.analytic import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    from robustbox.attacks.gaussian_process import Process, acquisition, maximise

    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    weights = torch.randn(dim, **draw)  # type: ignore[call-overload]
    points = F.normalize(torch.randn(observations, dim, **draw), dim=1)  # type: ignore[call-overload]
    values = points @ weights

    def admit(vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)

    def ours() -> None:
        """From n to 3n/2 observations, so that one fit is in it as in a run; a third of n queries for each n."""
        process = Process(dim)
        for point, value in zip(points, values.tolist(), strict=True):
            process.tell(point, value)
        start = time.process_time()
        process.fit()
        for _ in range(observations // 2):
            best = int(process.values.argmax())
            around = torch.randn(160, dim, **draw)  # type: ignore[call-overload]
            function = acquisition("ei", process, float(process.values[best]), 1.0)
            starts = admit(torch.cat([around, process.points[best : best + 1]]))
            point = maximise(function, starts, process.points, admit)
            process.tell(point, float(point @ weights))
        spent["ours"].append((time.process_time() - start) / (observations // 2))

    def plain() -> None:
        start = time.process_time()
        cube = (points + 1) / 2
        model = SingleTaskGP(cube, values[:, None])
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        bounds = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, dim)
        optimize_acqf(LogExpectedImprovement(model, values.max()), bounds, q=1, num_restarts=1, raw_samples=100)
        spent["plain"].append(time.process_time() - start)

    spent: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        ours()
        plain()
    mine, theirs = np.median(spent["ours"]), np.median(spent["plain"])
    print(
        f"CPU time a query, {observations} to {observations * 3 // 2} observations (plain: {observations}), d = {dim}:"
    )
    print(f"ours {mine * 1e3:.1f} ms, plain botorch loop {theirs * 1e3:.1f} ms, ratio {mine / theirs:.4f}")


if __name__ == "__main__":
    main()
