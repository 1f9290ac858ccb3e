"""What random features cost: processor time a row of the defended model over that of the bare one, interleaved in one run.

    OMP_NUM_THREADS=1 python scripts/bench_random_features.py [MODEL] [ROWS A PASS] [ROUNDS]

Each round times one pass of the bare model and one of each defended one, in turn; the ratio is the median over rounds of the
defended pass over the bare one of the same round.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.random_features import RandomFeatures
from robustbox.protocol import BlackBox


def main(model: str = "cifar10-resnet20", batch: int = 32, rounds: int = 60) -> None:
    """Print one line for each place, with the numbers that are drawn there for a row."""
    bare = as_black_box(rb.load_model(model))
    assert bare.input_shape
    rows = torch.rand(batch, *bare.input_shape, generator=torch.Generator().manual_seed(0))
    accounts = torch.arange(batch)
    boxes: dict[str, BlackBox] = {"input-noise": InputNoise().wrap(bare, 0)}
    for at in ("stage:-1", "stage:-2", "stage:1", "stem", "stage:*"):
        boxes[f"random-features at {at}"] = RandomFeatures(at=at).wrap(bare, 0)
    boxes["random-features at stage:-1, hash"] = RandomFeatures(mode="hash").wrap(bare, 0)
    spent: dict[str, list[float]] = {name: [] for name in ("bare", *boxes)}
    for _ in range(rounds + 3):
        for name, box in {"bare": bare, **boxes}.items():
            start = time.process_time()
            box.answer(rows, accounts)
            spent[name].append(time.process_time() - start)
    print(f"{model}, {batch} rows a pass, {rounds} rounds, {torch.get_num_threads()} threads")
    for name, times in spent.items():
        ratio = statistics.median(its / bares for its, bares in zip(times[3:], spent["bare"][3:], strict=True))
        print(f"{name:36} {statistics.median(times[3:]) / batch * 1e6:8.1f} us a row  {ratio - 1:+7.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:4]))
