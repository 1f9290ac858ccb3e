"""What the journal costs: time beside the same run without one, bytes a row, and seconds to read, replay and merge.

    python scripts/bench_journal.py [--rounds 7] [--budget 300]

One run attacks 8 CIFAR-10 images on ResNet-20, in passes of 32 rows, with and without a journal in turn, in processor time of
this process (the system's part included). Journals of shards are put together, as `--cluster` does, to a million rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robustbox import load_data, load_model
from robustbox.api import prepare
from robustbox.boxes import as_black_box
from robustbox.events import EventLog
from robustbox.journal import Journal
from robustbox.journaled import digest, journaled, packed
from robustbox.protocol import Answer


def seconds(work: Callable[[], object]) -> float:
    """Processor time of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def fight(box: Any, images: Any, labels: Any, path: Path | None, **setting: Any) -> int:
    """One run, its results left aside; returns the rows that were answered."""
    contest = prepare(box, images, labels, max_rows=32, **setting)
    journal = None if path is None else Journal(path)
    with journaled(contest.oracle, journal, contest.identity() if journal else {}):
        contest.check_clean()
        contest.fight(None)
        contest.verify()
    if journal is not None:
        journal.close()
    return sum(contest.oracle.ledger.values())


def cost(folder: Path, rounds: int, budget: int) -> None:
    """The ratio of times, and bytes a row, for an attack on labels and one on scores."""
    images, labels = load_data("foolbox:cifar10")[:2]
    box = as_black_box(load_model("cifar10-resnet20"))
    for name, setting in {
        "labels (cgba)": {"attack": "cgba"},
        "scores (square)": {"attack": "square", "norm": "l2", "epsilon": 0.1},
    }.items():
        without, with_it = [], []
        for k in range(rounds + 1):
            path = folder / f"{name}-{k}.sqlite"
            run = partial(fight, box, images[:8], labels[:8], budget=budget, **setting)
            without.append(seconds(partial(run, path=None)))
            with_it.append(seconds(partial(run, path=path)))
        journal = Journal(path)
        rows = journal.answered
        journal.close()
        ratios = [b / a for a, b in zip(without[1:], with_it[1:], strict=True)]  # the first round warms up
        replayed = seconds(partial(run, path=path))
        print(
            f"{name}: {rows} rows; time with a journal / without: median {statistics.median(ratios):.4f}, "
            f"of {rounds} from {min(ratios):.4f} to {max(ratios):.4f}; {path.stat().st_size / rows:.1f} bytes a row; "
            f"going through all of it again: {replayed / statistics.median(without[1:]):.3f} of a run"
        )


def parts(rows: int = 32) -> None:
    """The same cost summed from its parts, for one pass of ResNet-20's rows."""
    batch, accounts = torch.rand(rows, 3, 32, 32), torch.arange(rows)
    answer = Answer.of(torch.zeros(rows, dtype=torch.long), torch.rand(rows, 10))
    box = as_black_box(load_model("cifar10-resnet20"))
    with tempfile.TemporaryDirectory() as place:
        journal = Journal(Path(place) / "journal.sqlite")
        journal.begin({})

        def both() -> None:
            request = digest(batch, accounts)
            journal.now()
            journal.send(request, rows)
            journal.receive(packed(answer, box, True), rows)
            journal.now()

        work = {"journal": both, "model": lambda: box.answer(batch, accounts)}
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(60):
            for name, each in work.items():
                times[name].append(seconds(each))
    best = {name: min(values[5:]) for name, values in times.items()}
    print(
        f"a pass of {rows} rows: journal {1e6 * best['journal']:.0f} us, model {1e6 * best['model']:.0f} us, "
        f"share {best['journal'] / best['model']:.4f} (the least of 55 each, in turn)"
    )


def merging(folder: Path, shards: int = 10, rows: int = 100_000) -> None:
    """Reading and merging journals of labels, in passes of 32 rows."""
    box = as_black_box(load_model("digits-cnn"))
    content = packed(Answer.of(torch.zeros(32, dtype=torch.long)), box, False)
    for k in range(shards):
        journal = Journal(folder / f"shard-{k}.sqlite")
        journal.begin({"shard": k})
        for _ in range(rows // 32):
            journal.now()
            journal.send(bytes(16), 32)
            journal.now()
            journal.receive(content, 32)
        journal.end()
        journal.close()
    whole = folder / "whole.sqlite"

    def merge() -> None:
        journal = Journal(whole)
        for k in range(shards):
            log = EventLog(folder / f"shard-{k}.sqlite")
            journal.absorb(log.read(verify=True))
            log.close()
        journal.close()

    merged, read = seconds(merge), seconds(lambda: Journal(whole).close())
    million = shards * (rows // 32) * 32 / 1e6
    print(
        f"{shards} shards of {rows // 32 * 32} rows: merging {merged / million:.2f} s, opening and verifying "
        f"{read / million:.2f} s a million rows; {whole.stat().st_size / million / 1e6:.2f} bytes a row"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        parts()
        merging(Path(folder))
        cost(Path(folder), arguments.rounds, arguments.budget)


if __name__ == "__main__":
    main()
