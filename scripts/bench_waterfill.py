"""`waterfill` beside the attacks that it must beat, on networks and images it was not tuned on; and each of its ideas removed.

    python scripts/bench_waterfill.py                              every contest, every side: hours; goes on where it stopped
    python scripts/bench_waterfill.py --only cifar10 --sides waterfill cgba --images 20
    python scripts/bench_waterfill.py --only ablation --seeds 8    so many runs of each side: intervals are narrower
    python scripts/bench_waterfill.py --reference PATH --only cifar10    the authors' CGBA too (a checkout of it)
    python scripts/bench_waterfill.py --speed                      its rows/s over those of `random`, interleaved
    python scripts/bench_waterfill.py --markdown                   measures nothing, prints what is there as tables

The images are the first N of the file that the model classifies correctly, from number `skip` on. The options of the attack
were chosen on the images 100 to 160 of CIFAR-10, MNIST and digits and 30 to 42 of ImageNet. A cell is the median distance of
the best adversarial row found within so many queries, the start search included, and in brackets our own median over it. The
last column but one is the geometric mean over images and marks of a side's distance over ours, with a 95 % bootstrap
interval over images.
Every finished side is kept in --out. Rows/s are of the process's CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_bayes import MnistNet
from bench_cgba import reference

from robustbox import load_data, load_model, run_attack
from robustbox.attacks.race import Start
from robustbox.models.networks import CifarResNet
from robustbox.protocol import Answer, Query, Task
from robustbox.statistics import median

OURS = "waterfill"
MARKS = (100, 250, 500, 1000, 2000)
Side = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Contest:
    """A threat model, its images (number `skip` and the `images` that follow) and its sides: attacks with options."""

    data: str
    images: int
    budget: int
    sides: Mapping[str, Side]
    skip: int = 0
    norm: str = "l2"
    levels: int | None = None
    targeted: bool = False


def named(*names: str) -> dict[str, Side]:
    """Attacks at their defaults, ours first."""
    both: dict[str, Side] = {OURS: (OURS, {}), f"{OURS}, shared": (OURS, {"share_prior": True})}
    return both | {name: (name, {}) for name in names}


def isotropic(variances: Tensor, queries: float) -> Tensor:
    """White noise, in place of `water_filling`."""
    return torch.ones_like(variances)


def nowhere(*_: object, **__: object) -> Generator[Query, Answer, None]:
    """No start, in place of `climb`."""
    yield from ()


def unflipped(task: Task, row: Tensor) -> Generator[Query, Answer, Tensor]:
    """The row as it is, in place of `flip`."""
    yield from ()
    return row


def unraced(_: Task, starts: Sequence[Start]) -> Generator[Query, Answer, tuple[int, Tensor] | None]:
    """The first of the searches, in place of `race`."""
    point = yield from starts[0]
    return None if point is None else (0, point)


def independent(drawn: Tensor, kept: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows that know nothing of one another, in place of `orthonormal`."""
    return drawn / drawn.shape[1] ** 0.5, kept


TOWARDS = "with as long a climb as in l2"
"""What shows towards a target in linf alone."""
PRIOR: dict[str, dict[str, Any]] = {
    "without the colours' prior": {"spectrum.COLOUR": 1.0, "spectrum.COARSE": 1e9},
    "without the middle's prior": {"spectrum.MIDDLE": 0.0},
}
REMOVED: dict[str, dict[str, Any]] = {
    "without orthogonal noise": {"apart.orthonormal": independent},
    "without water-filling (white noise)": {"waterfill.water_filling": isotropic},
    "without the climb": {"approach.climb": nowhere},
    "without windows": {"patterns.WINDOWS": (1e3, 1e3)},
    "without the flips": {"approach.flip": unflipped},
    "without the race": {"approach.race": unraced},
    TOWARDS: {"approach.START": None},
    **PRIOR,
    "with a flat prior": {name: value for part in PRIOR.values() for name, value in part.items()},
    "without the perturbation's hint": {"waterfill.HINT": (0.0, 0.0)},
    "without the perturbation's filter": {"waterfill.filtered_like": lambda estimate, _: estimate},
    "without centring": {"waterfill.Lift.follow": lambda *_: None},
    "without the arc's evidence": {"spectrum.Evidence.rule_out": lambda *_: None},
    "with the ball's corners alone": {"waterfill.ADDED": 1e6},
    "without shorter noise at bends": {"waterfill.BENT": 0.0, "waterfill.SHORTER": {"l2": 2, "linf": 2}},
    "with short noise (0.05 R)": {"waterfill.NOISE": {"l2": 0.05, "linf": 0.05}},
}
"""Ideas that are no options: what stands in their place, by module and name in `robustbox.attacks`."""


UNUSED = {
    "l2": (
        "without the flips",
        "without the race",
        "with the ball's corners alone",
        "without shorter noise at bends",
        TOWARDS,
    ),
    "linf": (
        "without windows",
        "without the perturbation's hint",
        "without the perturbation's filter",
        "without centring",
        TOWARDS,
    ),
}
"""Ideas that have no part in a norm, untargeted."""


def without(norm: str) -> dict[str, Side]:
    """Ours, and ours without one of the ideas that have a part in a norm."""
    options: dict[str, Side] = {
        OURS: (OURS, {}),
        f"{OURS}, shared": (OURS, {"share_prior": True}),
        "without learning": (OURS, {"learn": False}),
        "without memory": (OURS, {"memory": 0.0}),
    }
    return options | {idea: (OURS, {}) for idea in REMOVED if idea not in UNUSED[norm]}


STARTS: dict[str, Side] = {"without the flips": (OURS, {}), "without the race": (OURS, {})}
FLIPPED: dict[str, Side] = {
    side: (OURS, {}) for side in ("without the flips", "without shorter noise at bends", TOWARDS)
}
TOWARDS_LINF = named("hop-skip-jump", "sign-flip") | FLIPPED
DCT_2: dict[str, Side] = {"cgba, DCT 2": ("cgba", {"subspace": "dct", "factor": 2})}
CONTESTS: dict[str, Contest] = {
    "cifar10": Contest("cifar10", 100, 2000, named("cgba", "hop-skip-jump", "tangent", "surfree", "geoda")),
    "mnist": Contest("mnist", 50, 1000, named("cgba", "hop-skip-jump") | DCT_2),
    "imagenet": Contest(
        "imagenet", 25, 1000, named("cgba", "hop-skip-jump") | {"cgba, DCT 8": ("cgba", {"factor": 8})}
    ),
    "8-bit": Contest("cifar10", 50, 2000, named("cgba-h", "cgba"), levels=256),
    "targeted": Contest("cifar10", 50, 2000, named("cgba-h", "cgba"), targeted=True),
    "8-bit-targeted": Contest("cifar10", 50, 2000, named("cgba-h"), levels=256, targeted=True),
    "linf": Contest("cifar10", 50, 2000, named("hop-skip-jump", "rays", "geoda"), norm="linf"),
    "linf-mnist": Contest("mnist", 50, 1000, named("hop-skip-jump", "rays") | STARTS, norm="linf"),
    "linf-second": Contest("zoo", 50, 2000, named("hop-skip-jump", "rays") | STARTS, skip=200, norm="linf"),
    "towards-linf": Contest("cifar10", 50, 2000, TOWARDS_LINF, norm="linf", targeted=True),
    "rounded-linf": Contest("cifar10", 50, 2000, named("rays", "hop-skip-jump") | STARTS, norm="linf", levels=256),
    "rounded-towards-linf": Contest("cifar10", 50, 2000, TOWARDS_LINF, norm="linf", levels=256, targeted=True),
    "towards-mnist-linf": Contest("mnist", 50, 1000, TOWARDS_LINF, norm="linf", targeted=True),
    "lite0-linf": Contest("imagenet", 25, 1000, named("rays", "geoda"), norm="linf"),
    "second": Contest("zoo", 50, 2000, named("cgba", "hop-skip-jump"), skip=200),
    "second-mnist": Contest("mnist", 200, 1000, named("hop-skip-jump") | DCT_2, skip=300),
    "ablation-cifar10": Contest("cifar10", 40, 1000, without("l2"), skip=160),
    "ablation-mnist": Contest("mnist", 50, 1000, without("l2"), skip=160),
    "ablation-digits": Contest("digits", 100, 500, without("l2")),
    "ablation-imagenet": Contest("imagenet", 8, 500, without("l2"), skip=60),
    "ablation-linf-cifar10": Contest("cifar10", 40, 1000, without("linf"), skip=160, norm="linf"),
    "ablation-linf-mnist": Contest("mnist", 50, 1000, without("linf"), skip=160, norm="linf"),
    "ablation-linf-digits": Contest("digits", 100, 500, without("linf"), norm="linf"),
    "ablation-linf-imagenet": Contest("imagenet", 8, 500, without("linf"), skip=60, norm="linf"),
}


@cache
def inputs(data: str, skip: int, n: int) -> tuple[nn.Module, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A model, n images that it classifies correctly with their labels, and a pool: the images that follow them."""
    folder = Path(os.environ.get("ROBUSTBOX_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
    model: nn.Module
    if data == "imagenet":
        model = load_model("imagenet-efficientnet-lite0")
        with zipfile.ZipFile(folder / "imagenet_sample_dev.zip") as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[: 2 * (skip + n) + 10]
            pixels = np.stack([np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names])
        labels = torch.tensor([int(Path(name).name[:4]) for name in names])
    elif data == "digits":
        model = load_model("digits-cnn")
        digits, truth = load_data("digits")[:2]
        return model, *first(model, torch.as_tensor(digits), torch.as_tensor(truth), skip, n)
    else:
        if data == "zoo":
            model = load_model("cifar10-resnet20")
        else:
            model = MnistNet() if data == "mnist" else CifarResNet()
            weights = "mnist_cnn_bayes_attack" if data == "mnist" else "cifar10_resnet20"
            model.load_state_dict(load_file(folder / f"weights/{weights}.safetensors"))
        with np.load(folder / f"{'mnist' if data == 'mnist' else 'cifar10'}_test_dev.npz") as archive:
            pixels, labels = (archive[key][: 2 * (skip + n) + 1000] for key in ("images", "labels"))
        labels = torch.from_numpy(labels).long()
    images = torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, 3, 1)).float().div(255)
    return model, *first(model, images.contiguous(), labels, skip, n)


@torch.no_grad()
def first(
    model: nn.Module, images: Tensor, labels: Tensor, skip: int, n: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The images number skip to skip + n of those classified correctly, their labels, and 500 more."""
    model.eval()
    right = torch.cat([model(batch).argmax(1) for batch in images.split(50)]) == labels
    images, labels = images[right][skip:], labels[right][skip:]
    return images[:n], labels[:n], (images[n : n + 500], labels[n : n + 500])


@contextmanager
def removed(side: str) -> Generator[None, None, None]:
    """While the idea that a side lacks is replaced; nothing for sides that lack none."""
    with ExitStack() as patches:
        for target, value in REMOVED.get(side, {}).items():
            patches.enter_context(patch(f"robustbox.attacks.{target}", value))
        yield


def measure(contest: Contest, side: Side, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One side's run, as plain JSON values."""
    model, images, labels, pool = inputs(contest.data, contest.skip, args.images or contest.images)
    aim: dict[str, Any] = {"targets": (labels + 1) % 10, "pool": pool} if contest.targeted else {}
    start, name = time.process_time(), side[0]
    result = run_attack(
        model,
        images,
        labels,
        name,
        contest.norm,
        budget=args.budget or contest.budget,
        levels=contest.levels,
        attack_options=side[1],
        seed=seed,
        **aim,
    )
    return {
        "traces": result.traces,
        "rows_per_second": sum(result.ledger.values()) / (time.process_time() - start),
        "errors": [error for error in result.errors if error],
    }


def authors(contest: Contest, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The authors' CGBA with its reference settings, in the full space."""
    model, images, _, _ = inputs(contest.data, contest.skip, args.images or contest.images)
    assert isinstance(model, CifarResNet)
    marks = [mark for mark in MARKS if mark <= (args.budget or contest.budget)]
    start = time.process_time()
    curves = [reference(args.reference, model, image, marks, 1, seed) for image in images]
    rows = len(images) * marks[-1] / (time.process_time() - start)
    traces = [[*zip(marks, curve, strict=True)] for curve in curves]
    return {"traces": traces, "rows_per_second": rows, "errors": []}


def curve(run: Mapping[str, Any], marks: Sequence[int]) -> NDArray[np.float64]:
    """Distances [images, marks]."""
    return np.array(
        [[min((far for q, far in trace if q <= mark), default=np.inf) for mark in marks] for trace in run["traces"]]
    )


def paired(ours: NDArray[np.float64], theirs: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """The geometric mean of theirs / ours [..., images, marks], with its 95 % bootstrap interval over images."""
    logs = np.log(theirs / ours).mean(axis=-1)
    logs = logs.reshape(-1, logs.shape[-1]).mean(axis=0)
    draws = np.random.default_rng(seed).choice(logs, (2000, len(logs))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def show(
    name: str, contest: Contest, runs: Mapping[str, Sequence[Mapping[str, Any]]], args: argparse.Namespace
) -> None:
    """The table of a contest: medians over all images and seeds."""
    marks = [mark for mark in MARKS if mark <= (args.budget or contest.budget)]
    far = {side: np.stack([curve(run, marks) for run in each]) for side, each in runs.items()}
    ours = far.get(OURS)
    rows = []
    for side, each in runs.items():
        middle = [median(far[side][:, :, k].ravel()) for k in range(len(marks))]
        cells = [f"{distance:.3g}" for distance in middle]
        pair = ""
        if ours is not None and side != OURS:
            ratios = [median(ours[:, :, k].ravel()) / distance for k, distance in enumerate(middle)]
            cells = [f"{cell} ({ratio:.2f})" for cell, ratio in zip(cells, ratios, strict=True)]
            pair = "{:.3f} ({:.3f}-{:.3f})".format(*paired(ours, far[side]))
        errors = sum(len(run["errors"]) for run in each)
        speed = f"{median([run['rows_per_second'] for run in each]):,.0f}"
        rows.append([side, *cells, pair, speed + (f", {errors} errors" if errors else "")])
    n = next(iter(far.values())).shape[1]
    seeds = f"seeds {args.seed} to {args.seed + args.seeds - 1}" if args.seeds > 1 else f"seed {args.seed}"
    title = f"{name}: {contest.data}, {contest.norm}, images {contest.skip} to {contest.skip + n}, {seeds}"
    head = ["side", *map(str, marks), "distance over ours, paired (95 %)", "rows/s"]
    if args.markdown:
        lines = [head, ["---"] * len(head), *rows]
        print(f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
        return
    table = Table(*head, title=title)
    for line in rows:
        table.add_row(*line)
    Console(width=170).print(table)


def speed(args: argparse.Namespace) -> None:
    """Rows per second of CPU time beside those of a blind attack, whose time is the loop's and the model's; alternating."""
    model, images, labels, _ = inputs("cifar10", 130, args.images or 20)
    for budget in [args.budget] if args.budget else [300, 1000]:
        shares = []
        for turn in range(5):
            rates = {}
            for name in (OURS, "random") if turn % 2 else ("random", OURS):
                start = time.process_time()
                result = run_attack(model, images, labels, name, "l2", budget=budget, seed=args.seed, max_rows=32)
                rates[name] = sum(result.ledger.values()) / (time.process_time() - start)
            shares.append(rates[OURS] / rates["random"])
        print(
            f"rows/s of {OURS} over those of random, {budget} rows an image: "
            + ", ".join(f"{share:.2f}" for share in shares)
            + f"; median {np.median(shares):.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="waterfill beside its rivals, and without its ideas.")
    parser.add_argument("--only", nargs="+", default=list(CONTESTS), help="contests whose names begin so")
    parser.add_argument("--sides", nargs="+", help="these sides alone")
    parser.add_argument("--images", type=int)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="so many runs of each side, from that seed on")
    parser.add_argument("--reference", type=Path, help="a checkout of the CGBA authors' code")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_waterfill"))
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.speed:
        return speed(args)
    for name, contest in CONTESTS.items():
        if not name.startswith(tuple(args.only)):
            continue
        size = f"{args.images or contest.images}x{args.budget or contest.budget}"
        runs: dict[str, Sequence[Mapping[str, Any]]] = {}
        for side in list(contest.sides) + (["authors' CGBA"] if name == "cifar10" else []):
            files = [
                args.out / f"{name}-{size}-seed{seed}" / f"{side}.json"
                for seed in range(args.seed, args.seed + args.seeds)
            ]
            wanted = not args.markdown and (not args.sides or side in args.sides)
            if wanted and (side in contest.sides or args.reference):
                for seed, file in enumerate(files, args.seed):
                    if file.exists():
                        continue
                    print(f"{name}: {side}, seed {seed}", file=sys.stderr, flush=True)
                    with removed(side):
                        if side in contest.sides:
                            run = measure(contest, contest.sides[side], args, seed)
                        else:
                            run = authors(contest, args, seed)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(run))
            if all(file.exists() for file in files):
                runs[side] = [json.loads(file.read_text()) for file in files]
        if runs:
            show(name, contest, runs, args)


if __name__ == "__main__":
    main()
