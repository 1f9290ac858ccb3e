"""Measure the stateful gates: time, growth, memory, and how often they refuse honest users.

    python scripts/bench_gates.py                    all parts, on the shared data
    python scripts/bench_gates.py --only speed gate growth dense lookup neighbours false again pairs see

Times are processor time of one thread in milliseconds a query, since other work on the machine disturbs the clock; both
sides of a ratio run in turns in one process, and medians over repeats are shown. The in-process reference is Blacklight as
published: SHA-256 of every window, and a table from hash to list of queries.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled

from train_cifar10 import data_folder, training_set

from robustbox import registry
from robustbox.defenses.blacklight import Blacklight
from robustbox.defenses.gate import StatefulDefense, StatefulGate
from robustbox.defenses.index import SketchIndex, Tokens
from robustbox.defenses.jpeg import JPEG
from robustbox.defenses.neighbours import DenseIndex
from robustbox.defenses.osd import OSD
from robustbox.defenses.transforms import Transformed
from robustbox.protocol import Answer, BlackBox

SETS = ["CIFAR-10", "MNIST", "ImageNet"]
COMMON = np.array([0, 20_000])
"""Where the two common windows of a synthetic sketch are numbered from."""


class Free(BlackBox):
    """Answers class 0 to everything, at no cost."""

    name, classes, scores = "free", 2, "none"

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return Answer.of(torch.zeros(len(rows), dtype=torch.long))


class Published:
    """Blacklight's table as published: from hash to the queries that hold it."""

    def __init__(self) -> None:
        self.holders: dict[int, list[int]] = {}
        self.queries = 0

    def match(self, tokens: Tokens) -> int:
        found = Counter(row for token in tokens.tolist() for row in self.holders.get(token, ()))
        return found.most_common(1)[0][1] if found else 0

    def add(self, tokens: Tokens) -> None:
        for token in tokens.tolist():
            self.holders.setdefault(token, []).append(self.queries)
        self.queries += 1


def gate(name: str, **options: Any) -> StatefulGate:
    """A gate by name in front of a model that costs nothing."""
    defense: StatefulDefense = registry.load("defenses", name)(**options)
    box = defense.wrap(Free(), 0)
    assert isinstance(box, StatefulGate)
    return box


def sent(box: StatefulGate, rows: Tensor, at_once: int = 256) -> Tensor:
    """The statuses of rows that one account sends."""
    return torch.cat(
        [box.answer(part, torch.zeros(len(part), dtype=torch.long)).status for part in rows.split(at_once)]
    )


def cpu(run: Callable[[], object], queries: int) -> float:
    """Processor milliseconds a query."""
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start) / queries


def cifar() -> Tensor:
    """9,000 CIFAR-10 test images [9000,3,32,32]."""
    return torch.from_numpy(np.load(data_folder() / "cifar10_test_dev.npz")["images"]).permute(0, 3, 1, 2).float() / 255


def mnist() -> Tensor:
    """9,000 MNIST test images [9000,1,28,28]."""
    return torch.from_numpy(np.load(data_folder() / "mnist_test_dev.npz")["images"])[:, None].float() / 255


def imagenet() -> Tensor:
    """250 ImageNet images [250,3,224,224]."""
    with zipfile.ZipFile(data_folder() / "imagenet_sample_dev.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def speed(repeats: int) -> None:
    """The fingerprint, vectorised and as published."""
    for what, rows, few in (("32 px, batch 256", cifar()[:256], 32), ("224 px, batch 16", imagenet()[:16], 4)):
        shape = (rows.shape[1], rows.shape[2], rows.shape[3])
        sides = {}
        for hash, n in (("keyed", len(rows)), ("sha256", few)):
            defense = Blacklight(hash=hash)  # type: ignore[arg-type]
            secret = defense.secret(shape, torch.Generator().manual_seed(0))
            sides[hash] = (lambda d=defense, s=secret, x=rows[:n]: d.prints(x, [s] * len(x))), n
        times: dict[str, list[float]] = {hash: [] for hash in sides}
        for _ in range(repeats):
            for hash, (run, n) in sides.items():
                times[hash].append(cpu(run, n))
        ratio = statistics.median(slow / fast for fast, slow in zip(times["keyed"], times["sha256"], strict=True))
        keyed, sha = (statistics.median(values) for values in times.values())
        print(f"fingerprint, {what}: keyed {keyed:.3f} ms, sha256 {sha:.3f} ms: {ratio:.1f} times faster")


def whole(repeats: int) -> None:
    """Fingerprint, look-up and insert, ours and as published, on natural images."""
    rows = cifar()[:1024]
    sha = Blacklight(hash="sha256")
    secret = sha.secret((3, 32, 32), torch.Generator().manual_seed(0))

    def reference(digests: int) -> None:
        table = Published()
        for row in rows[:48]:
            for _ in range(digests):
                (tokens,) = sha.prints(row[None], [secret])
            table.match(tokens)
            table.add(tokens)

    found: dict[str, list[float]] = {}
    names = ("blacklight", "blacklight-keyed", "piha", "osd", "qpa", "gwad")
    for _ in range(repeats):
        for digests in (1, 2):
            found.setdefault(f"published, {digests} digests", []).append(cpu(lambda d=digests: reference(d), 48))
        for name in names:
            box = gate(name)
            found.setdefault(name, []).append(cpu(lambda b=box: sent(b, rows), len(rows)))
    for name, values in found.items():
        print(f"whole gate, 32 px, 1,024 natural images: {name:22} {statistics.median(values):.3f} ms a query")
    digits = mnist()[:128]
    print(f"whole gate, 28 px, 128 images: iot-sdm {cpu(lambda: sent(gate('iot-sdm'), digits), 128):.3f} ms a query")
    photos = imagenet()[:64]
    for name in ("blacklight", "blacklight-keyed", "piha", "gwad"):
        print(
            f"whole gate, 224 px, 64 images: {name:17} {cpu(lambda n=name: sent(gate(n), photos), 64):.3f} ms a query"
        )


def growth() -> None:
    """20,000 near-identical queries: the last thousand against the first; hits, and probes that are none."""
    image = cifar()[0]
    for name, sigma in (
        ("blacklight", 0.001),
        ("blacklight", 0.0075),
        ("qpa", 0.001),
        ("piha", 0.001),
        ("gwad", 0.001),
    ):
        box, times, hits = gate(name), [], 0
        stream = torch.Generator().manual_seed(0)
        for _ in range(20):
            rows = (image + sigma * torch.randn(1000, 3, 32, 32, generator=stream)).clamp(0, 1)
            start = time.process_time()
            hits += int((sent(box, rows) > 0).sum())
            times.append(time.process_time() - start)
        size = box.statistics()["bytes_per_query"]
        print(
            f"growth, {name}, noise {sigma}: {times[0]:.3f} ms a query in the first thousand, {times[-1]:.3f} in the last, "
            f"ratio {times[-1] / times[0]:.2f}; {hits / 200:.1f} % refused, {size:.0f} bytes a query"
        )


def dense() -> None:
    """20,000 embeddings in the index of `osd`: noisy copies of one image, and points of a sphere that are just no hits."""
    image, defense, stream = cifar()[0], OSD(), torch.Generator().manual_seed(0)
    (centre,) = embedded(image[None])

    def copies(sigma: float) -> Tensor:
        return embedded((image + sigma * torch.randn(1000, 3, 32, 32, generator=stream)).clamp(0, 1))

    def sphere(radius: float) -> Tensor:
        return centre + radius * torch.nn.functional.normalize(torch.randn(1000, 256, generator=stream), dim=1)

    cases: list[tuple[str, Callable[[float], Tensor], float, int]] = [
        ("noisy copies", copies, 0.001, 20),
        ("a sphere in all dimensions", sphere, 0.6, 5),
    ]
    for what, draw, scale, thousands in cases:
        index, times, hits = DenseIndex(256, torch.device("cpu")), [], 0
        for _ in range(thousands):
            rows, start = draw(scale), time.process_time()
            for row in rows:
                hits += index.mean_distance(row, defense.k, defense.threshold)[0] <= defense.threshold
                index.add(row)
            times.append(time.process_time() - start)
        print(
            f"growth of osd's index, {what}, {scale}: {times[0]:.3f} ms a query in the first thousand, {times[-1]:.3f} in the "
            f"{thousands}th, ratio {times[-1] / times[0]:.2f}; {hits} hits of {1000 * thousands:,}",
            flush=True,
        )


def see() -> None:
    """The share of 40 independent noisy copies that are refused, mean over ten CIFAR-10 images, by noise a pixel."""
    images, scales = cifar()[:10], (0.003, 0.006, 0.0085, 0.010, 0.012, 0.015, 0.020, 0.030)
    for name in ("blacklight", "blacklight-keyed", "qpa", "piha"):
        shares = []
        for sigma in scales:
            stream, refused = torch.Generator().manual_seed(0), 0
            for image in images:
                rows = (image + sigma * torch.randn(40, 3, 32, 32, generator=stream)).clamp(0, 1)
                refused += int((sent(gate(name), rows) > 0).sum())
            shares.append(f"{sigma}: {refused / 400:.2f}")
        print(f"refused by {name}, of noisy copies, by noise: {', '.join(shares)}", flush=True)


def lookup(sizes: list[int]) -> None:
    """Look-ups in large tables of unrelated sketches, each sharing a few hashes with some: strangers and near copies."""
    random = np.random.default_rng(0)
    index, queries = SketchIndex(), 300
    for size in sizes:
        start = time.process_time()
        while len(index) < size:
            rows = random.integers(2**62, size=(1000, 50))
            rows[:, :2] = random.integers(20_000, size=(1000, 2)) + COMMON
            for row in rows:
                index.add(row)
        built = time.process_time() - start
        strangers = random.integers(2**62, size=(queries, 50))
        strangers[:, :2] = random.integers(20_000, size=(queries, 2)) + COMMON
        far = cpu(lambda s=strangers: [index.best(row, 26) for row in s], queries)
        copies = rows[random.integers(1000, size=queries)].copy()
        copies[:, 30:] = random.integers(2**62, size=(queries, 20))
        near = cpu(lambda c=copies: [index.best(row, 26) for row in c], queries)
        print(
            f"look-up among {size:,} rows: {far:.3f} ms for a stranger, {near:.3f} ms for a near copy; "
            f"{index.nbytes / size:.0f} bytes a row, built in {built:.0f} s"
        )


def neighbours(sizes: list[int]) -> None:
    """k-NN look-ups of `osd` among its embeddings of real images and their mirror images, beside every row's distance.

    The table holds CIFAR-10 training images; strangers are test images, near copies are noisy stored ones (hits).
    """
    gate, queries = OSD(), 200
    stored, _ = training_set(data_folder() / "cifar10_train_jpeg.tar.gz")
    stored = torch.cat((stored, stored.flip(3)))[
        torch.randperm(2 * len(stored), generator=torch.Generator().manual_seed(0))
    ]
    strangers = embedded(cifar()[:queries])
    index, rows = DenseIndex(256, torch.device("cpu")), torch.empty(0, 256)
    for size in sizes:
        size = min(size, len(stored))
        rows = torch.cat((rows, embedded(stored[len(rows) : size].float() / 255)))
        start = time.process_time()
        for row in rows[len(index) :]:
            index.add(row)
        built = 1e3 * (time.process_time() - start)
        copies = stored[:queries].float() / 255
        near = embedded(
            (copies + 0.01 * torch.randn(copies.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
        )
        for what, asked in (("stranger", strangers), ("near copy", near)):
            fast = cpu(lambda a=asked: [index.mean_distance(row, gate.k, gate.threshold) for row in a], queries)
            slow = cpu(lambda a=asked: [index.mean_distance(row, gate.k) for row in a[:20]], 20)
            print(
                f"k-NN among {len(index):,} embeddings: {fast:.3f} ms for a {what}, {slow:.2f} ms by all distances; "
                f"{index.nbytes / len(index):.0f} bytes a row, the last {built:.0f} ms of processor time for adding",
                flush=True,
            )


def embedded(rows: Tensor) -> Tensor:
    """The embeddings of `osd` [n,256]."""
    return torch.cat([torch.stack(list(OSD().prints(part, [part.device] * len(part)))) for part in rows.split(256)])


def false_positives(chosen_sets: list[str]) -> None:
    """Natural images in random order, all in one table."""
    sets = {"CIFAR-10": cifar(), "MNIST": mnist(), "ImageNet, 224 px": imagenet()}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("CIFAR-10", name, {}) for name in ("blacklight", "blacklight-keyed", "piha", "osd", "qpa", "gwad")
    ]
    cases += [("CIFAR-10", "blacklight", {"salt": "none"}), ("MNIST", "blacklight", {})]
    cases += [("MNIST", "blacklight", {"salt": "none"}), ("MNIST", "blacklight-keyed", {}), ("MNIST", "gwad", {})]
    cases += [("ImageNet, 224 px", name, {}) for name in ("blacklight", "blacklight-keyed", "piha", "qpa", "gwad")]
    for data, name, options in cases:
        if not any(data.startswith(chosen) for chosen in chosen_sets):
            continue
        rows = sets[data]
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        box = gate(name, **options)
        if "MNIST" in data:
            rows = rows[:2000]  # near strokes make long lists of common windows
        sent(box, rows)
        hits = int(box.statistics()["hits"])  # type: ignore[call-overload]
        low, high = binomtest(hits, len(rows)).proportion_ci(method="exact")
        chosen = "".join(f" {key}={value}" for key, value in options.items())
        print(
            f"false positives, {data}: {name}{chosen}: {hits} of {len(rows)}, {hits / len(rows):.2%} "
            f"(95 % interval {low:.3%} to {high:.3%})",
            flush=True,
        )


def edits() -> dict[str, Callable[[Tensor], Tensor]]:
    """What honest users do to a picture before they send it again, by name: rows [n,C,H,W] to rows, as 8 bits."""

    def brighter(rows: Tensor) -> Tensor:
        return (rows + 8 / 255).clamp(0, 1)

    def encoded(quality: int) -> Callable[[Tensor], Tensor]:
        def through(rows: Tensor) -> Tensor:
            box = JPEG(quality).wrap(Free(), 0)
            assert isinstance(box, Transformed)
            return box.transform(rows)

        return through

    return {
        "the same": lambda rows: rows,
        "JPEG 90": encoded(90),
        "JPEG 50": encoded(50),
        "shifted by a pixel": lambda rows: rows.roll((1, 1), (2, 3)),
        "brighter by 8 levels": brighter,
        "mirrored": lambda rows: rows.flip(3),
    }


def again(n: int = 1000) -> None:
    """Natural images of CIFAR-10, and each of them a second time, edited, all from one account in random order."""
    rows = cifar()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][:n]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for name in ("blacklight", "blacklight-keyed", "piha", "osd", "qpa", "gwad"):
        found = []
        for what, edit in edits().items():
            box = gate(name)
            sent(box, rows)
            before = int(box.statistics()["hits"])  # type: ignore[call-overload]
            sent(box, edit(rows)[order])
            found.append(f"{what} {int(box.statistics()['hits']) - before}")  # type: ignore[call-overload]
        print(f"sent again, of {n}: {name}: {', '.join(found)}", flush=True)


def pairs() -> None:
    """How often two different images share at least m hashes of Blacklight's fingerprint; for `qpa`."""
    rows, defense = cifar(), Blacklight()
    counts = np.zeros(51, dtype=np.int64)
    for seed in (0, 1):
        secret = defense.secret((3, 32, 32), torch.Generator().manual_seed(seed))
        index = SketchIndex()
        for part in rows.split(500):
            for tokens in defense.prints(part, [secret] * len(part)):
                for _, shared in index.shared(tokens):
                    counts += np.bincount(shared, minlength=51)
                index.add(tokens)
    every = len(rows) * (len(rows) - 1)
    tail = counts[::-1].cumsum()[::-1] / every
    print("pairs of CIFAR-10 images with at least m matches:", " ".join(f"{m}: {tail[m]:.1e}" for m in range(1, 25)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["speed", "gate", "growth", "dense", "lookup", "neighbours", "false", "again", "pairs", "see"]
    parser.add_argument("--only", nargs="*", default=every, choices=every, help="parts to measure (all)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all sides in turns (5)")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[100_000, 1_000_000], help="sizes of the tables of `lookup`"
    )
    parser.add_argument(
        "--sets",
        nargs="*",
        default=SETS,
        choices=SETS,
        help="whose images `false` sends (all): CIFAR-10, MNIST, ImageNet",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], None]] = {
        "speed": lambda: speed(options.repeats),
        "gate": lambda: whole(options.repeats),
        "growth": growth,
        "dense": dense,
        "lookup": lambda: lookup(options.rows),
        "neighbours": lambda: neighbours([20_000, 100_000]),
        "false": lambda: false_positives(options.sets),
        "again": again,
        "pairs": pairs,
        "see": see,
    }
    for part in options.only:
        parts[part]()


if __name__ == "__main__":
    main()
