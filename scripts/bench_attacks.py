"""Every attack beside its blind control and its peers: one table a threat model, all through the same oracle.

    python scripts/bench_attacks.py                                        50 images, 5000 queries each: hours
    python scripts/bench_attacks.py --images 20 --budget 1000 --only l2 --sides cgba surfree
    python scripts/bench_attacks.py --markdown                             what is done so far, as tables for docs/

The images are the first N of the real CIFAR-10 file that the ResNet-20 of the data folder classifies correctly (`imagenet-l2`:
of the 224 x 224 sample, with EfficientNet-Lite0). A cell is the median distance after so many queries (a failure counts as
infinite), or, at a fixed radius, how many images succeeded by then. Every finished side is kept in --out, and a run goes on
where another one stopped.

Rows/s are rows a second of processor time, summed over threads, each side alone, all images at once: the side's own time, the
engine's and the model's. In brackets, by how many rows the model answers a processor second by itself in batches of 32, just
before and just after the side: 1 would be an attack that costs nothing. Compare these shares; the speeds depend on the machine.

Peers are other people's code, unchanged: foolbox by our own adapter; ART 1.20.1 and torchattacks 3.5.1 are installed without
their dependencies into build/peers, where only this script looks. Their rows pass our oracle as an attack's do, within the
same budget; what they draw from random states of their own (ART's HopSkipJump) differs from run to run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_cgba import load

from robustbox import load_model, registry, run_attack
from robustbox.attacks.guest import Ask, Guest, Randomness
from robustbox.protocol import NORMS, Attack, Norm, Search, Task
from robustbox.records import inside
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
    data: str = "cifar10"

    def title(self) -> str:
        """The threat model in words."""
        radius = "least distance" if self.epsilon is None else f"within {self.epsilon:g}"
        return f"{self.norm}, {radius}, {self.knowledge}s, {self.data}"


def ours(name: str, **options: Any) -> Callable[[], Attack]:
    """One of the registered attacks, foolbox's included."""
    return lambda: registry.load("attacks", name)(**options)


def art(name: str, **options: Any) -> Callable[[], Attack]:
    """One of ART's evasion attacks."""
    return lambda: Peer(partial(art_attack, name, **options))


def contests() -> dict[str, Contest]:
    """All that is measured: each attack, its control, its peers."""
    l2 = {
        "cgba": ours("cgba"),
        "cgba-h": ours("cgba-h"),
        "surfree": ours("surfree"),
        "hop-skip-jump": ours("hop-skip-jump"),
        "hop-skip-jump, n0 = 100 as in the paper": ours("hop-skip-jump", n0=100),
        "qeba": ours("qeba"),
        "geoda": ours("geoda"),
        "tangent": ours("tangent"),
        "sign-opt": ours("sign-opt"),
        "boundary": ours("boundary"),
        "waterfill": ours("waterfill"),
        "random (control)": ours("random"),
        "foolbox HopSkipJump, 30 evaluations": ours("foolbox:HopSkipJumpAttack", initial_gradient_eval_steps=30),
        "foolbox HopSkipJump, 100 evaluations": ours("foolbox:HopSkipJumpAttack"),
        "foolbox Boundary": ours("foolbox:BoundaryAttack"),
        "ART HopSkipJump, 30 evaluations": art("HopSkipJump", norm=2, max_iter=1000, init_eval=30),
        "ART HopSkipJump, 100 evaluations": art("HopSkipJump", norm=2, max_iter=1000),
        "ART GeoDA": art("GeoDA", norm=2, max_iter=4000),
        "ART SignOPT": art("SignOPTAttack", targeted=False, max_iter=1000, query_limit=10**6),
        "ART Boundary": art("BoundaryAttack", targeted=False, max_iter=10**5),
    }
    linf = {
        "hop-skip-jump": ours("hop-skip-jump"),
        "rays": ours("rays"),
        "sign-flip": ours("sign-flip"),
        "geoda": ours("geoda"),
        "sign-opt": ours("sign-opt"),
        "waterfill": ours("waterfill"),
        "random (control)": ours("random"),
        "foolbox HopSkipJump, 30 evaluations": ours(
            "foolbox:HopSkipJumpAttack", initial_gradient_eval_steps=30, constraint="linf"
        ),
        "foolbox HopSkipJump, 100 evaluations": ours("foolbox:HopSkipJumpAttack", constraint="linf"),
        "ART HopSkipJump, 30 evaluations": art("HopSkipJump", norm=np.inf, max_iter=1000, init_eval=30),
        "ART HopSkipJump, 100 evaluations": art("HopSkipJump", norm=np.inf, max_iter=1000),
        "ART GeoDA": art("GeoDA", norm=np.inf, max_iter=4000),
    }
    labels = {
        "rays": ours("rays"),
        "sign-flip": ours("sign-flip"),
        "bayes-subspace distance": ours("bayes-subspace", objective="distance"),
        "bayes-subspace label (paper)": ours("bayes-subspace", objective="label"),
        "its control: random in the subspace": ours("bayes-subspace", acquisition="random"),
        "its control: sobol in the subspace": ours("bayes-subspace", acquisition="sobol"),
        "hop-skip-jump": ours("hop-skip-jump"),
        "geoda": ours("geoda"),
        "random (control)": ours("random"),
        "foolbox HopSkipJump, 30 evaluations": ours(
            "foolbox:HopSkipJumpAttack", initial_gradient_eval_steps=30, constraint="linf"
        ),
        "ART HopSkipJump, 30 evaluations": art("HopSkipJump", norm=np.inf, max_iter=1000, init_eval=30),
        "ART GeoDA": art("GeoDA", norm=np.inf, max_iter=4000),
    }
    scores = {
        "square": ours("square"),
        "square, horizon = 2000": ours("square", horizon=2000),
        "nes": ours("nes"),
        "bandits": ours("bandits"),
        "sign-hunter": ours("sign-hunter"),
        "zo-sign-sgd": ours("zo-sign-sgd"),
        "simba dct": ours("simba", basis="dct"),
        "simba pixel": ours("simba", basis="pixel"),
        "bayes-subspace margin": ours("bayes-subspace", objective="margin"),
        "random (control)": ours("random"),
        "ART Square": art("SquareAttack", norm=np.inf, eps=0.03, max_iter=10_000),
        "torchattacks Square": lambda: Peer(torchattacks_square),
    }
    scores_l2 = {
        "square": ours("square"),
        "square, horizon = 2000": ours("square", horizon=2000),
        "nes": ours("nes"),
        "bandits": ours("bandits"),
        "sign-hunter": ours("sign-hunter"),
        "simba dct": ours("simba", basis="dct"),
        "simba pixel": ours("simba", basis="pixel"),
        "random (control)": ours("random"),
        "ART Square": art("SquareAttack", norm=2, eps=0.5, max_iter=10_000),
        "torchattacks Square": lambda: Peer(torchattacks_square),
        "ART SimBA dct": art("SimBA", attack="dct", epsilon=0.2, max_iter=3000, freq_dim=8),
        "ART SimBA pixel": art("SimBA", attack="px", epsilon=0.2, max_iter=3000),
    }
    scores_free = {
        "simba dct": ours("simba", basis="dct"),
        "simba pixel": ours("simba", basis="pixel"),
        "ART SimBA dct": art("SimBA", attack="dct", epsilon=0.2, max_iter=3000, freq_dim=8),
        "ART SimBA pixel": art("SimBA", attack="px", epsilon=0.2, max_iter=3000),
    }
    pixels = {
        "one-pixel-fast": ours("one-pixel-fast"),
        "one-pixel paper": ours("one-pixel", preset="paper"),
        "one-pixel best1": ours("one-pixel", preset="best1"),
        "pixel-exhaustive (control)": ours("pixel-exhaustive"),
        "random-pixels (control)": ours("random-pixels"),
        "torchattacks OnePixel": lambda: Peer(torchattacks_one_pixel),
        "ART Pixel": art("PixelAttack", th=1, es=1, max_iter=100),
    }
    large = {
        "cgba": ours("cgba"),
        "surfree": ours("surfree"),
        "hop-skip-jump": ours("hop-skip-jump"),
        "qeba": ours("qeba"),
    }
    return {
        "l2": Contest("l2", None, "label", l2),
        "linf": Contest("linf", None, "label", linf),
        "linf-labels": Contest("linf", 0.03, "label", labels),
        "linf-scores": Contest("linf", 0.03, "score", scores),
        "l2-scores": Contest("l2", 0.5, "score", scores_l2),
        "l2-scores-free": Contest("l2", None, "score", scores_free),
        "l0": Contest("l0", 1, "score", pixels),
        "imagenet-l2": Contest("l2", None, "label", large, "imagenet"),
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


def art_attack(name: str, ask: Ask, task: Task, **options: Any) -> object:
    """One of ART's evasion attacks on one image."""
    install("art")
    np.mat = getattr(np, "mat", np.asmatrix)  # NumPy 2 has it no more, ART's GeoDA still asks for it
    from art.attacks import evasion
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    model = BlackBoxClassifierNeuralNetwork(predict(ask), tuple(task.image.shape), CLASSES, clip_values=(0.0, 1.0))
    attack = getattr(evasion, name)(model, verbose=False, **options)
    return attack.generate(task.image[None].numpy(), y=np.eye(CLASSES, dtype=np.float32)[[task.label]])


class Asking(nn.Module):
    """The black box as torchattacks takes it: from rows to logarithms of probabilities."""

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self.ask = ask
        self.where = nn.Parameter(torch.zeros(1), requires_grad=False)  # it looks for the device here

    def forward(self, rows: Tensor) -> Tensor:
        """Log-probabilities of rows."""
        scores = self.ask(rows.clamp(0, 1)).scores
        assert scores is not None
        return scores.log()


def torchattacks_one_pixel(ask: Ask, task: Task) -> object:
    """torchattacks' OnePixel with a population of 400 and 20 steps."""
    install("torchattacks")
    from torchattacks import OnePixel

    attack = OnePixel(Asking(ask).eval(), pixels=1, steps=20, popsize=400)
    return attack(task.image[None], torch.tensor([task.label]))


def torchattacks_square(ask: Ask, task: Task) -> object:
    """torchattacks' Square, as many queries as there are."""
    install("torchattacks")
    from torchattacks import Square

    norm = {"linf": "Linf", "l2": "L2"}[task.norm]
    seed = int(torch.randint(2**31, (1,), generator=task.generator))
    attack = Square(Asking(ask).eval(), norm, task.epsilon, n_queries=task.remaining, loss="margin", seed=seed)
    return attack(task.image[None], torch.tensor([task.label]))


def install(package: str) -> None:
    """Put a peer's package where only this script finds it."""
    if not (PEERS / package).is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
        subprocess.run([*pip, *PACKAGES[package]], check=True)
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))


@cache
def inputs(data: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and the first n images of its data that it classifies correctly, with their labels."""
    if data == "cifar10":
        return load(n)[:3]
    model = load_model("imagenet-efficientnet-lite0")
    folder = Path(os.environ.get("ROBUSTBOX_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
    kept, labels = [], []
    with zipfile.ZipFile(folder / "imagenet_sample_dev.zip") as archive:
        for name in sorted(each for each in archive.namelist() if each.endswith(".jpg")):
            pixels = np.asarray(Image.open(archive.open(name)).convert("RGB"))
            image, label = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255, int(Path(name).name[:4])
            with torch.no_grad():
                if int(model(image[None]).argmax()) == label:
                    kept.append(image)
                    labels.append(label)
            if len(kept) == n:
                break
    return model, torch.stack(kept), torch.tensor(labels)


def measure(contest: Contest, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side's run, as plain JSON values."""
    model, images, labels = inputs(contest.data, args.images)
    attack = contest.sides[side]()
    setting = {"epsilon": contest.epsilon, "budget": args.budget, "knowledge": contest.knowledge, "seed": args.seed}
    before, start = speed(model, images), time.process_time()
    result = run_attack(model, images, labels, attack, contest.norm, **setting)
    spent = time.process_time() - start
    return {
        "traces": result.traces,
        "queries": result.queries.tolist(),
        "rows_per_processor_second": sum(result.ledger.values()) / spent,
        "model_rows_per_processor_second": (before + speed(model, images)) / 2,
        "errors": [error for error in result.errors if error],
    }


def speed(model: nn.Module, images: Tensor, size: int = 32, seconds: float = 1.0) -> float:
    """Rows that a model answers a processor second by itself, in batches of `size`, measured for `seconds`."""
    batch, rows = images.repeat(-(-size // len(images)), 1, 1, 1)[:size], 0
    with torch.no_grad():
        model(batch)
        start = time.process_time()
        while (spent := time.process_time() - start) < seconds:
            model(batch)
            rows += size
    return rows / spent


def row(side: str, run: dict[str, Any], epsilon: float | None, marks: list[int]) -> list[str]:
    """One line of the table."""
    traces = run["traces"]
    n = len(traces)
    first = [next((query for query, far in trace if inside(far, epsilon)), np.inf) for trace in traces]
    hits = int(np.isfinite(first).sum())
    low, high = wilson(hits, n)
    if epsilon is None:
        best = [
            [min((far for query, far in trace if query <= mark), default=np.inf) for trace in traces] for mark in marks
        ]
        cells = [f"{median(each):.3g}" for each in best]
    else:
        cells = [str(sum(query <= mark for query in first)) for mark in marks]
    errors = f" ({len(run['errors'])} errors)" if run["errors"] else ""
    rate = run["rows_per_processor_second"]
    return [
        side + errors,
        f"{hits} of {n} ({low:.0%}-{high:.0%})",
        *cells,
        f"{median(first):,.0f}",
        f"{np.mean(run['queries']):,.0f}",
        f"{rate:,.0f} ({rate / run['model_rows_per_processor_second']:.2f})",
    ]


def show(contest: Contest, runs: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """The table of a threat model, for the terminal or as markdown."""
    marks = [mark for mark in MARKS if mark < args.budget] + [args.budget]
    head = ["side", "success (95 %)", *map(str, marks), "median first", "rows an image", "rows/s"]
    rows = [row(side, runs[side], contest.epsilon, marks) for side in contest.sides if side in runs]
    title = f"{contest.title()}; {args.images} images, seed {args.seed}"
    if args.markdown:
        lines = [head, ["---"] * len(head), *rows]
        print(f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
        return
    table = Table(*head, title=title)
    for line in rows:
        table.add_row(*line)
    Console(width=160).print(table)


def main() -> None:
    everything = contests()
    parser = argparse.ArgumentParser(description="Every attack beside its control and its peers.")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--budget", type=int, default=5000)
    parser.add_argument("--only", nargs="+", choices=list(everything), default=list(everything))
    parser.add_argument("--sides", nargs="+", help="these sides alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_attacks"), help="a folder, one file a side")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args()
    out = args.out.resolve()
    PEERS.mkdir(parents=True, exist_ok=True)
    os.chdir(PEERS)  # some of them write files where they stand

    for name in args.only:
        contest, runs = everything[name], {}
        for side in contest.sides:
            file = out / f"{name}-{args.images}x{args.budget}-seed{args.seed}" / f"{side}.json"
            wanted = not args.markdown and (not args.sides or side in args.sides)
            if wanted and not file.exists():
                print(f"{name}: {side}", file=sys.stderr, flush=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(measure(contest, side, args)))
            if file.exists():
                runs[side] = json.loads(file.read_text())
        if runs:
            show(contest, runs, args)


if __name__ == "__main__":
    main()
