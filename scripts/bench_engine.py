"""Measure what the engine costs: rows per second beside the bare model and foolbox, time a round, memory.

    python scripts/bench_engine.py                      everything, about five minutes on two cores
    python scripts/bench_engine.py --models digits-cnn --repeats 1 --seconds 1

All sides run in one process, in turns, and each is divided by the bare model's speed just before and after it, since
other work on the machine slows all of them; figures are medians of these ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled

import robustbox as rb
from robustbox import registry
from robustbox.identity import stream
from robustbox.loop import QueryLoop
from robustbox.oracle import Oracle
from robustbox.protocol import Answer, Attack, BlackBox, Query, Search, Task
from robustbox.records import Record

DATA = {"cifar10-resnet20": "foolbox:cifar10", "digits-cnn": "digits"}
BARS = {"cifar10-resnet20": 0.90, "digits-cnn": 0.35}
"""The least share of the bare model's rows per second that the attack must reach."""
IMAGES = 64
SIZES = (8, 16, 32, 64, 128, 256, 512)
COMPANY = (16, 64, 256, 1024)
GROWTH = 1.25
"""What an image's share of a round may cost more among the most images than among the fewest."""


def subject(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A zoo model, n different images, and the labels that the model gives them (so that all of them are attacked)."""
    model = rb.load_model(name)
    images = rb.load_data(DATA[name]).images
    images = images.repeat(-(-n // len(images)), 1, 1, 1)[:n]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) / 100
    images = (images + noise).clamp(0, 1)
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


# Rows per second.


@dataclass
class Pace:
    """Rows and how long they took: seconds of the clock, and of this process on all cores."""

    rows: int
    clock: float
    cpu: float

    def over(self, other: Pace) -> float:
        """This speed over another one, by the clock."""
        return self.rows / self.clock / (other.rows / other.clock)

    def over_by_cpu(self, other: Pace) -> float:
        """This speed over another one, by processor time, which other processes disturb least."""
        return self.rows / self.cpu / (other.rows / other.cpu)


def paced(rows: Callable[[], int]) -> Pace:
    """The pace of a call that says how many rows it sent."""
    clock, cpu = time.perf_counter(), time.process_time()
    return Pace(rows(), time.perf_counter() - clock, time.process_time() - cpu)


def bare(model: nn.Module, images: Tensor, size: int, seconds: float) -> Pace:
    """The bare model in batches of one size."""
    rows = images.repeat(-(-size // len(images)), 1, 1, 1)[:size].contiguous()

    def run() -> int:
        start, passes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            model(rows)
            passes += 1
        return passes * size

    with torch.no_grad():
        model(rows)
        return paced(run)


def ours(model: nn.Module, images: Tensor, labels: Tensor, budget: int) -> int:
    """Rows of robustbox's CGBA on all images, clean check and verification included."""
    return sum(rb.run_attack(model, images, labels, "cgba", budget=budget).ledger.values())


class TimeUpError(Exception):
    """Raised inside the model to end foolbox's run."""


def theirs(model: nn.Module, images: Tensor, labels: Tensor, at_once: int, seconds: float) -> int:
    """Rows of foolbox's HopSkipJump, counted by a hook on the model and stopped by it when the time is up.

    Each image starts from one that the model gives another label, so that no start search can fail.
    """
    import foolbox

    rows, start = 0, time.perf_counter()

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal rows
        if time.perf_counter() - start > seconds:
            raise TimeUpError
        rows += len(inputs[0])

    others = torch.stack([images[(labels != label).nonzero()[0, 0]] for label in labels])
    attack = foolbox.attacks.HopSkipJumpAttack(steps=64, initial_gradient_eval_steps=30)
    victim = foolbox.models.PyTorchModel(model, bounds=(0, 1), device=images.device)
    hook = model.register_forward_pre_hook(count)
    try:
        for k in range(0, len(images), at_once):
            part = slice(k, k + at_once)
            attack.run(victim, images[part], labels[part], starting_points=others[part])
    except (AssertionError, TimeUpError):  # foolbox asserts that a row alone and among others has one label
        pass
    finally:
        hook.remove()
    return rows


def speed(name: str, repeats: int, seconds: float) -> dict[str, Any]:
    """All sides in turns: their rows per second, and their shares of the bare model's; medians."""
    model, images, labels = subject(name, IMAGES)
    sweep = {size: [bare(model, images, size, seconds / 10) for _ in range(3)] for size in SIZES}
    rates = {size: max(pace.rows / pace.clock for pace in paces) for size, paces in sweep.items()}
    best = max(rates, key=lambda size: rates[size])
    budget = max(500, int(seconds * rates[best] / IMAGES))  # long enough for what is learnt at the start to pay
    sides: dict[str, Callable[[], int]] = {
        "robustbox CGBA": lambda: ours(model, images, labels, budget),
        "foolbox HopSkipJump, one image at a time": lambda: theirs(model, images, labels, 1, seconds),
        f"foolbox HopSkipJump, {IMAGES} at once": lambda: theirs(model, images, labels, IMAGES, seconds),
    }
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            before, pace, after = (
                bare(model, images, best, seconds / 4),
                paced(run),
                bare(model, images, best, seconds / 4),
            )
            alone = Pace(before.rows + after.rows, before.clock + after.clock, before.cpu + after.cpu)
            found[side].append((pace.rows / pace.clock, pace.over(alone), pace.over_by_cpu(alone)))
    medians = {side: [statistics.median(column) for column in zip(*rows, strict=True)] for side, rows in found.items()}
    return {
        "model": name,
        "bare_rows_per_second": {str(size): rate for size, rate in rates.items()},
        "best_batch": best,
        "budget": budget,
        "rows_per_second": {side: median[0] for side, median in medians.items()},
        "share": {side: median[1] for side, median in medians.items()},
        "share_by_cpu": {side: median[2] for side, median in medians.items()},
        "bar": BARS[name],
    }


# The engine alone.


class Free(BlackBox):
    """Answers class 0 to everything, at no cost."""

    name, classes, scores = "free", 2, "none"

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return Answer.of(torch.zeros(len(rows), dtype=torch.long))


class Idle(Attack):
    """Asks its image again and again, at no cost."""

    name: ClassVar[str] = "idle"

    def search(self, task: Task) -> Search:
        query = Query(task.image[None])
        while True:
            yield query


def overhead(n: int, rounds: int) -> float:
    """Microseconds that the engine takes for one image in one round, among n images of 1 x 8 x 8 with one row each."""
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    tasks = [Task(image, 0, None, "l2", None, stream(cpu, i), rounds) for i, image in enumerate(images)]
    records = [Record(i, rounds) for i in range(n)]
    loop = QueryLoop(Oracle(Free()), Idle(), tasks, records)
    start = time.perf_counter()
    loop.run()
    return (time.perf_counter() - start) / (n * rounds) * 1e6


def overheads(repeats: int) -> dict[str, Any]:
    """The engine's time an image and round in growing company, medians over interleaved repeats."""
    found: dict[int, list[float]] = {n: [] for n in COMPANY}
    for _ in range(repeats):
        for n in COMPANY:
            found[n].append(overhead(n, max(8, 40_960 // n)))
    growth = statistics.median(most / least for least, most in zip(found[COMPANY[0]], found[COMPANY[-1]], strict=True))
    return {"microseconds": {str(n): statistics.median(values) for n, values in found.items()}, "growth": growth}


# Memory.


class Bright(BlackBox):
    """Class 1 where the mean of a row exceeds 0.6: a model without activations to speak of."""

    name, classes, scores = "bright", 2, "none"

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return Answer.of((rows.mean(dim=(1, 2, 3)) > 0.6).long())


class Watched(Attack):
    """CGBA, with a note of how many rows were asked and not yet answered at any time."""

    name: ClassVar[str] = "watched"

    def __init__(self) -> None:
        self.attack: Attack = registry.load("attacks", "cgba")()
        self.now = self.most = 0

    def search(self, task: Task) -> Search:
        search = self.attack.search(task)
        query = [next(search)]
        while True:
            rows = len(query[0].rows)
            self.now += rows
            self.most = max(self.most, self.now)
            answer = yield query.pop()  # not kept here: whether rows live on is the loop's business
            self.now -= rows
            query.append(search.send(answer))


def peak(n: int) -> dict[str, int]:
    """What CGBA on n images of 3 x 32 x 32 adds to the peak memory, and the most rows in flight, in bytes."""
    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    attack = Watched()
    before = _peak_bytes()
    rb.run_attack(Bright(), images, [0] * n, attack, budget=200, max_rows=64)
    return {"bytes": _peak_bytes() - before, "rows_in_flight": attack.most * images[0].numel() * 4}


def _peak_bytes() -> int:
    """The most memory that this process ever held."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's ru_maxrss would begin at the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> dict[str, Any]:
    """Peak memory at 16 and 256 images, each in its own process, and its growth over that of the rows in flight."""
    peaks = {}
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives freed tensors back at once
    for n in (16, 256):
        command = [sys.executable, __file__, "--peak", str(n)]
        peaks[n] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=exact).stdout)
    growth, rows = (peaks[256][key] - peaks[16][key] for key in ("bytes", "rows_in_flight"))
    return {"peaks": {str(n): peak for n, peak in peaks.items()}, "growth_over_rows_in_flight": growth / rows}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    for found in report["speed"]:
        best = found["best_batch"]
        lines.append(
            f"{found['model']}: bare model {found['bare_rows_per_second'][str(best)]:,.0f} rows/s at batch {best}"
        )
        for side, rate in found["rows_per_second"].items():
            share, by_cpu = found["share"][side], found["share_by_cpu"][side]
            bar = f"   bar {found['bar']:.2f} {verdict(share >= found['bar'])}" if side.startswith("robustbox") else ""
            lines.append(
                f"  {side:<42}{rate:>10,.0f} rows/s   {share:.2f} of bare, {by_cpu:.2f} by processor time{bar}"
            )
    if "overhead" in report:
        costs, growth = report["overhead"]["microseconds"], report["overhead"]["growth"]
        lines.append("engine alone, microseconds an image and round")
        lines += [f"  {n + ' images':<42}{cost:>10.1f}" for n, cost in costs.items()]
        lines.append(f"  {'growth from fewest to most':<42}{growth:>10.2f}   bar {GROWTH} {verdict(growth <= GROWTH)}")
    if "memory" in report:
        lines.append("peak memory of CGBA over start, 3 x 32 x 32, passes of 64 rows")
        for n, found in report["memory"]["peaks"].items():
            used, rows = found["bytes"] / 2**20, found["rows_in_flight"] / 2**20
            lines.append(f"  {n + ' images':<42}{used:>10.1f} MiB      {rows:.1f} MiB of rows in flight")
        lines.append(f"  {'growth over rows in flight':<42}{report['memory']['growth_over_rows_in_flight']:>10.2f}")
    return "\n".join(lines)


def verdict(met: bool) -> str:
    """How a bar went."""
    return "met" if met else "MISSED"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(DATA), choices=list(DATA), help="zoo models to measure")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all sides in turns (5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds a side and round (4)")
    parser.add_argument("--threads", type=int, help="threads of torch (its default)")
    parser.add_argument("--only", choices=["speed", "overhead", "memory"], help="one part only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.peak)))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    parts = [options.only] if options.only else ["speed", "overhead", "memory"]
    report: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "speed": [speed(name, options.repeats, options.seconds) for name in options.models if "speed" in parts],
    }
    if "overhead" in parts:
        report["overhead"] = overheads(options.repeats)
    if "memory" in parts:
        report["memory"] = memory()
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
