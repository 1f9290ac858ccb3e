"""Attacks against stateful gates: gate x attack x way of attacking, on real CIFAR-10 images and a ResNet-20.

    python scripts/eval_stateful.py                                        all of it: some hours, cell by cell
    python scripts/eval_stateful.py --images 5 --budget 1000 --seeds 0 --gates none blacklight --attacks hop-skip-jump
    python scripts/eval_stateful.py --gates blacklight --bans 1 10 any     with bans at the first hit, and so many accounts
    python scripts/eval_stateful.py --render                               only the table, from the cells that there are

Every cell that was run stands in the file `--cells`, beside the table, and is not run again: a run that was interrupted goes on
where it stopped, and a new cell joins those that there are. The table is written from all cells of that file into `--table`.

The setting is that of the authors of OARS: the first images that the model classifies correctly, targeted within l2 2.77 (0.05
a pixel, root mean square) or linf 0.05, Square untargeted. Targets are the class after the true one; starts come from 500
images that follow those attacked. The gate keeps a history for each account, empty at first; every image is an attack of its
own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_cgba import load
from train_cifar10 import data_folder

from robustbox import registry, run_attack
from robustbox.boxes import as_black_box
from robustbox.identity import derive_seed, sha256
from robustbox.inputs import resolve_attack
from robustbox.protocol import ANSWERED, Answer, Attack, BlackBox, Norm, Query, Search, Task
from robustbox.statistics import median, wilson

ROOT = Path(__file__).resolve().parents[1]
MARKS = (1000, 2500, 5000)
FREE = 3
"""A success within so many queries owes nothing to the gate's absence or presence."""
GATES = ("none", "blacklight", "piha", "osd", "qpa", "gwad", "blacklight-keyed")


@dataclass(frozen=True)
class Goal:
    """What an attack is to reach: its norm, radius, whether a target class."""

    norm: Norm
    epsilon: float
    targeted: bool


ATTACKS = {
    "nes": Goal("linf", 0.05, True),
    "square": Goal("linf", 0.05, False),
    "hop-skip-jump": Goal("l2", 2.77, True),
    "qeba": Goal("l2", 2.77, True),
    "surfree": Goal("l2", 2.77, False),
    "boundary": Goal("l2", 2.77, True),
    "waterfill": Goal("l2", 2.77, True),
}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "abort": ("abort:{}", {}),
    "persist": ("{}", {}),
    "oars": ("oars:{}", {}),
    "oars-reference": ("oars:{}", {"parity": "reference"}),
    "oars-unguarded": ("oars:{}", {"guard": "off"}),
    "oars-skip": ("oars:{}", {"guard": "skip"}),
    "oars-scout": ("oars:{}", {"scout": True}),
    "oars-scatter": ("oars:{}", {"scatter": 0.35}),
    "blinded": ("blinded:{}", {}),
    "oars-blinded": ("oars:blinded:{}", {}),
    "rehearsed": ("rehearsed:{}", {"gate": "{}"}),
    "oars-rehearsed": ("oars:rehearsed:{}", {"gate": "{}"}),
}
"""Ways of attacking: the scheme around the attack, and its options, where {} stands for the gate."""
USUAL = ["abort", "persist", "oars", "blinded"]
MEANING = {
    "abort": "the attack as it is, ended by the first refusal",
    "persist": "the attack as it is; a refused row tells nothing, and it goes on",
    "oars": "scales adapted in flight, refused rows drawn again, others kept apart",
    "oars-reference": "bounds and search of the OARS authors",
    "oars-unguarded": "oars, without keeping apart what cannot be drawn again",
    "oars-skip": "oars, points that come too near to earlier ones not asked instead of moved",
    "oars-scout": "oars, searching for scales on another account and on other images",
    "oars-scatter": "oars, each probe at a scale of its own, in random order",
    "blinded": "every row rolled by up to 2 pixels and mirrored at random",
    "oars-blinded": "oars around blinded",
    "rehearsed": "every row drawn again in private until the attacker's own copy of the gate lets it pass",
    "oars-rehearsed": "oars around rehearsed",
}


@dataclass(frozen=True)
class Cell:
    """One run: a gate, an attack, a way of attacking, a seed; accounts under bans, or None where hits are only refused."""

    gate: str
    attack: str
    mode: str
    seed: int
    bans: str | None = None

    def key(self, images: int, budget: int) -> str:
        """Under which name it stands in the file."""
        return "/".join([self.gate, self.attack, self.mode, self.bans or "-", f"{images}x{budget}", str(self.seed)])


class Watched(Attack):
    """An attack under observation: how many rows it sent in its two phases, over all images, and how many were refused.

    `phases` holds rows and refused rows as {"attack": [n, r], "calibrate": [n, r]}.
    """

    name = "watched"

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.phases = {"attack": [0, 0], "calibrate": [0, 0]}
        for told in ("name", "knowledge", "norms", "targeted", "needs_epsilon", "knobs"):
            setattr(self, told, getattr(attack, told))

    def options(self) -> dict[str, object]:
        return self.attack.options()

    def check(self, task: Task) -> None:
        self.attack.check(task)

    def search(self, task: Task) -> Search:
        return self._counting(self.attack.search(task))

    def _counting(self, search: Search) -> Generator[Query, Answer, None]:
        answer: Answer | None = None
        while True:
            try:
                query = next(search) if answer is None else search.send(answer)
            except StopIteration:
                return
            count = self.phases["calibrate" if query.kind == "calibrate" else "attack"]
            count[0] += len(query.rows)
            answer = yield query
            count[1] += int((answer.status != ANSWERED).sum())


def run(cell: Cell, images: int, budget: int) -> dict[str, Any]:
    """One cell: everything that the table needs, image by image, as plain JSON values."""
    model, clean, labels, pool = load(images)
    goal, (scheme, options) = ATTACKS[cell.attack], MODES[cell.mode]
    box, gate = as_black_box(model, "auto"), None
    if cell.gate != "none":
        ban = {} if cell.bans is None else {"action": "ban", "strikes": 1}
        box = gate = registry.load("defenses", cell.gate)(**ban).wrap(box, cell.seed)
    chosen = {name: value.format(cell.gate) if isinstance(value, str) else value for name, value in options.items()}
    watched = Watched(resolve_attack(scheme.format(cell.attack), chosen))
    start = time.perf_counter()
    result = run_attack(
        box,
        clean,
        labels,
        watched,
        norm=goal.norm,
        epsilon=goal.epsilon,
        targets=(labels + 1) % 10 if goal.targeted else None,
        budget=budget,
        seed=cell.seed,
        pool=pool,
        accounts=None if cell.bans == "any" else int(cell.bans or 1),
    )
    record = {
        "first_success": result.first_success.tolist(),
        "success": result.success_any.tolist(),
        "fresh": result.success_fresh.tolist(),
        "queries": result.queries.tolist(),
        "rejected": result.rejected.tolist(),
        "detected_at": result.first_rejected.tolist(),
        "accounts_burnt": result.accounts_burnt.tolist(),
        "phases": watched.phases,
        "errors": [error for error in result.errors if error],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if gate is not None:
        statistics = gate.statistics()
        accounts = [derive_seed(cell.seed, sha256(image), watched.name, "account", 0) for image in clean]
        if not result.rejected.any():  # a silent gate: its own books tell
            record["detected_at"] = [gate.standing(account).first_hit for account in accounts]
            record["rejected"] = [gate.standing(account).hits for account in accounts]
        record["milliseconds"] = round(statistics["milliseconds_per_query"], 3)
    return record


class Constant(BlackBox):
    """Answers class 0: a stand-in where only the gate counts."""

    name, classes, scores = "constant", 10, "none"

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return Answer.of(torch.zeros(len(rows), dtype=torch.long, device=rows.device))


def benign(gate: str, rows: int, seed: int) -> dict[str, Any]:
    """Hits among natural images, all of them different, that one account sends in random order."""
    with np.load(data_folder() / "cifar10_test_dev.npz") as archive:
        images = torch.from_numpy(archive["images"][:rows]).permute(0, 3, 1, 2).float() / 255
    box = registry.load("defenses", gate)().wrap(Constant(), seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for part in images[order].split(50):
        box.answer(part, torch.zeros(len(part), dtype=torch.long))
    statistics = box.statistics()
    return {name: statistics[name] for name in ("rows", "hits", "milliseconds_per_query", "bytes_per_query")}


# The table.


def percentile(values: Iterable[float], share: float) -> str:
    """An order statistic where 0 stands for never, as text."""
    found = sorted(value or np.inf for value in values)
    at = found[min(int(np.ceil(share * len(found))) - 1, len(found) - 1)]
    return "never" if at == np.inf else f"{at:,.0f}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def pooled(records: list[dict[str, Any]], name: str) -> list[Any]:
    """A field of all images of all seeds."""
    return [value for record in records for value in record[name]]


def line(records: list[dict[str, Any]], marks: list[int]) -> list[str]:
    """One row of the table: a cell over all its seeds."""
    first, rejected, queries = (pooled(records, name) for name in ("first_success", "rejected", "queries"))
    detected = pooled(records, "detected_at")
    n = len(first)
    at = [sum(0 < query <= mark for query in first) for mark in marks]
    low, high = wilson(at[-1], n)
    shares = [
        percent(*(sum(record["phases"][phase][part] for record in records) for part in (1, 0)))
        for phase in ("calibrate", "attack")
    ]
    milliseconds = float(np.mean([record.get("milliseconds", 0.0) for record in records]))
    return [
        " / ".join(map(str, at)) + f" of {n}",
        f"{low:.2f}-{high:.2f}",
        str(sum(pooled(records, "fresh"))),
        str(sum(0 < query <= FREE for query in first)),
        f"{median([query or np.inf for query in first]):,.0f}",
        percent(sum(1 for query in detected if query), n),
        f"{percentile(detected, 0.5)} / {percentile(detected, 0.9)}",
        f"{np.mean(rejected):.1f} of {np.mean(queries):,.0f}",
        " / ".join(shares),
        f"{np.mean(pooled(records, 'accounts_burnt')):.1f}",
        f"{milliseconds:.2f}",
    ]


def markdown(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def render(cells: dict[str, Any]) -> str:
    """All cells as one page."""
    groups: dict[tuple[str, str], dict[tuple[str, str, str], list[dict[str, Any]]]] = {}
    for key, record in cells.items():
        gate, *rest = key.split("/")
        if gate != "benign":
            attack, mode, bans, size, _ = rest
            groups.setdefault((size, bans), {}).setdefault((gate, attack, mode), []).append(record)
    text = ["# Attacks against stateful gates", "", *INTRODUCTION.strip().splitlines(), ""]
    text += [f"- `{mode}`: {MEANING[mode]}" for mode in MODES] + [""]
    for (size, bans), group in sorted(groups.items()):
        images, budget = map(int, size.split("x"))
        marks = sorted({mark for mark in MARKS if mark < budget} | {budget})
        seeds = max(map(len, group.values()))
        title = f"## {images} images, {budget:,} queries, up to {seeds} seed{'s' if seeds > 1 else ''}"
        text += [title + ("" if bans == "-" else f"; banned at the first hit, accounts: {bans}"), ""]
        header = ["gate", "attack", "way", f"success at {' / '.join(f'{mark:,}' for mark in marks)}", *COLUMNS]
        rows = [[*names, *line(records, marks)] for names, records in sorted(group.items(), key=_order)]
        text += [*markdown(header, rows), *not_run(group)]
        if bans == "-" and (bought := ratios(cells, size)):
            text += [RATIOS.strip(), ""]
            text += markdown(["gate", "attack", "way", "seeds", "no gate", "behind the gate", "ratio", "95 %"], bought)
    if hits := [(key.split("/")[1], record) for key, record in cells.items() if key.startswith("benign/")]:
        text += ["## Benign queries", "", *BENIGN.strip().splitlines(), ""]
        rows = [
            [gate, f"{found['hits']} of {found['rows']:,}", clopper_pearson(found), *_cost(found)]
            for gate, found in sorted(hits, key=lambda hit: GATES.index(hit[0]))
        ]
        text += markdown(["gate", "hits", "95 % (Clopper-Pearson)", "ms a query", "bytes a query"], rows)
    return "\n".join(text)


def ratios(cells: dict[str, Any], size: str) -> list[list[str]]:
    """How many times the queries of the attack without a gate OARS takes, over the seeds of both; where all images fell."""
    keys = [key.split("/") for key in cells if not key.startswith("benign/")]
    found = {(g, a, m) for g, a, m, bans, images, _ in keys if m.startswith("oars") and (bans, images) == ("-", size)}
    rows = []
    for gate, attack, mode in sorted(found, key=lambda names: _order((names, None))):
        sides = [
            {seed: cells[key]["first_success"] for seed in range(10) if (key := f"{way}/-/{size}/{seed}") in cells}
            for way in (f"none/{attack}/persist", f"{gate}/{attack}/{mode}")
        ]
        seeds = sorted(sides[0].keys() & sides[1].keys())
        plain, oars = (np.array([side[seed] for seed in seeds]) for side in sides)
        if seeds and plain.all() and oars.all():
            draws = np.random.default_rng(0).integers(plain.shape[1], size=(10_000, plain.shape[1]))
            drawn = (side.sum(axis=0)[draws].sum(axis=1) for side in (oars, plain))
            low, high = np.quantile(np.divide(*drawn), (0.025, 0.975))
            figures = [f"{plain.mean():,.0f}", f"{oars.mean():,.0f}", f"{oars.mean() / plain.mean():.2f}"]
            rows.append([gate, attack, mode, str(len(seeds)), *figures, f"{low:.2f}-{high:.2f}"])
    return rows


def not_run(group: dict[tuple[str, str, str], Any]) -> list[str]:
    """For each usual way by which some cell was run, the gates and attacks for which none was."""
    text = []
    for mode in USUAL:
        if any(way == mode for _, _, way in group):
            missing = {
                gate: [attack for attack in ATTACKS if (gate, attack, mode) not in group]
                for gate in GATES
                if gate != "none" or mode == "persist"
            }
            named = [f"{gate} ({', '.join(attacks)})" for gate, attacks in missing.items() if attacks]
            text += [f"Not run with `{mode}`: {'; '.join(named)}.", ""] if named else []
    return text


def clopper_pearson(found: dict[str, Any]) -> str:
    """The exact interval of a share of hits, in percent."""
    from scipy.stats import binomtest

    interval = binomtest(found["hits"], found["rows"]).proportion_ci(0.95, method="exact")
    return f"{100 * interval.low:.3f}-{100 * interval.high:.3f} %"


def _cost(found: dict[str, Any]) -> list[str]:
    return [f"{found['milliseconds_per_query']:.2f}", f"{found['bytes_per_query']:,.0f}"]


def _order(item: tuple[tuple[str, str, str], Any]) -> tuple[int, int, int]:
    gate, attack, mode = item[0]
    return GATES.index(gate), list(ATTACKS).index(attack), list(MODES).index(mode)


COLUMNS = [
    "95 % at the last",
    "fresh",
    f"free (at most {FREE})",
    "median queries",
    "detected, % of attacks",
    "first detection, median / p90",
    "refused rows",
    "refused, % of calibration / attack",
    "accounts burnt",
    "ms a query",
]
RATIOS = """
Queries to the first success, means over images and seeds, where every image fell; intervals by bootstrap over images.
"""
BENIGN = """
CIFAR-10 test images, all of them different, sent by one account in random order (`--benign 9000`): how many are refused, and
what the gate costs. Bytes a query: all that the account's history has allocated (`bytes_per_query`), reserves and rows not
sorted yet too, over the rows that it remembers.
"""
INTRODUCTION = """
Written by `python scripts/eval_stateful.py`; the script's head says how each figure comes about.

ResNet-20, the first CIFAR-10 images that it classifies correctly; targeted (the class after the true one, starts from 500 other
images) within l2 2.77 or, NES, linf 0.05; Square untargeted within linf 0.05, SurFree untargeted within l2 2.77. Every query
counts, refused ones and calibration too. Success: a row inside the ball that the gate let pass and the model answered with
the goal. *fresh*: the same row, sent by another account at the end. *free*: successes within the first 3 queries. Medians count
failures as infinite. Detected: at least one row was refused, or, by a silent gate, noted. Milliseconds are wall clock, on a
machine that was busy with other work. The cells of `blinded` and `oars-blinded` are of a version that told the attack a moved
row's answer even where the row itself had been asked and gave another one.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Attacks against stateful gates.")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--budget", type=int, default=5000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=USUAL)
    parser.add_argument("--bans", nargs="*", help="accounts of an attacker whose first hit bans it: numbers, or any")
    parser.add_argument("--benign", type=int, default=0, metavar="N", help="send N natural images through each gate")
    parser.add_argument("--cells", type=Path, default=ROOT / "docs/stateful-cells.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/stateful-table.md")
    parser.add_argument("--render", action="store_true", help="run nothing, write the table")
    args = parser.parse_args()

    cells: dict[str, Any] = json.loads(args.cells.read_text()) if args.cells.is_file() else {}

    def keep(key: str, record: dict[str, Any]) -> None:
        cells[key] = record
        args.cells.parent.mkdir(parents=True, exist_ok=True)
        part = args.cells.with_suffix(".part")
        part.write_text(
            "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(cells.items())) + "\n}\n"
        )
        part.replace(args.cells)
        print(f"{key} done", file=sys.stderr, flush=True)

    wanted = product(args.seeds, args.gates, args.attacks, args.modes, args.bans or [None])
    for seed, gate, attack, mode, bans in () if args.render else wanted:
        cell = Cell(gate, attack, mode, seed, bans)
        key = cell.key(args.images, args.budget)
        pointless = gate == "none" and (mode == "abort" or bans is not None)
        if key not in cells and not pointless:
            keep(key, run(cell, args.images, args.budget))
    for gate in args.gates if args.benign and not args.render else ():
        key = f"benign/{gate}/{args.benign}"
        if gate != "none" and key not in cells:
            keep(key, benign(gate, args.benign, args.seeds[0]))
    args.table.write_text(render(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
