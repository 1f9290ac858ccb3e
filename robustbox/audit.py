"""`python -m robustbox.audit FILE`: a matrix of models, defenses, attacks, threat models and budgets, held against thresholds.

Exit codes: 0 every threshold holds; 1 one is missed, or what it bounds could not be measured; 2 bad input, or a
folder that can no longer be written to (one line on stderr says what); 130 the audit was interrupted: the same command goes on
with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from robustbox.auditing.cells import Cell, Executor, Outcome, in_turn
from robustbox.auditing.estimate import Estimate
from robustbox.auditing.flags import flags_of
from robustbox.auditing.junit import complaint
from robustbox.auditing.loading import load
from robustbox.auditing.plan import Plan
from robustbox.auditing.run import Audit, AuditResult
from robustbox.auditing.world import World
from robustbox.cluster import Cluster
from robustbox.errors import InputError, OneLineParser, StorageError
from robustbox.loop import Progress

PROGRAM = "python -m robustbox.audit"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        result = run(_parser().parse_args(argv))
    except (InputError, StorageError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on with it", file=sys.stderr)
        return 130
    return 0 if result is None or result.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=PROGRAM, description="Audit defended models, as docs/audit.md describes.")
    parser.add_argument("file", type=Path, help="the audit, a YAML file")
    parser.add_argument(
        "--out", type=Path, help="the audit's folder, where it goes on if it was stopped; default: runs/NAME"
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="run the cells on a Ray cluster: `local`, or the address of one (docs/cluster.md)",
    )
    for name, kind, default, meaning in (
        ("images-per-task", int, Cluster.images, "images of a cell that one task attacks, where a cell can be cut"),
        ("cpus-per-worker", float, Cluster.cpus, "cores that a task asks for"),
        ("gpus-per-worker", float, Cluster.gpus, "GPUs that a task asks for, or part of one"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"with --cluster: {meaning}; default: {default}"
        )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and what it costs at most, ask no query")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    return parser


def run(arguments: argparse.Namespace) -> AuditResult | None:
    """Audit as the command line says; None after a dry run."""
    console = Console(quiet=arguments.quiet, width=None if sys.stdout.isatty() else 120)
    audit = Audit(load(arguments.file), arguments.out, World())
    if arguments.dry_run:
        audit.check_folder()
    show_plan(audit.plan, console)
    show_estimate(audit.estimate(), console)
    if arguments.dry_run:
        console.print("no query was asked")
        return None
    executor = _executor(arguments)
    with audit, Matrix(audit, sys.stderr, arguments.quiet or None) as bar:
        audit.preflight(lambda system: bar.say(f"looking at {system.id}"))
        show_preflight(audit, console)
        bar.begin()
        try:
            for outcome in audit.run(executor, watch=bar):
                bar.end(outcome)
            for name, error in audit.certify():
                bar.certified(name, error)
        except KeyboardInterrupt:
            audit.conclude()  # of what is there by now
            raise
        result = audit.conclude()
    show(result, console)
    return result


def _executor(arguments: argparse.Namespace) -> Executor:
    if arguments.cluster is None:
        return in_turn
    cluster = Cluster(
        address=arguments.cluster,
        images=arguments.images_per_task,
        cpus=arguments.cpus_per_worker,
        gpus=arguments.gpus_per_worker,
    )
    cluster.connect()
    return cluster


class Matrix(AbstractContextManager["Matrix"]):
    """A progress bar over all cells: rows of the worst case, and where the audit stands.

    Args:
        audit: whose cells.
        stream: where to draw.
        disable: True never draws, None draws on terminals only.
    """

    def __init__(self, audit: Audit, stream: TextIO, disable: bool | None) -> None:
        self._audit, self._stream, self._disable = audit, stream, disable
        self._bar: Any = None
        self._begun: dict[str, int] = {}
        self._done = 0

    def say(self, what: str) -> None:
        """Say what happens before there is a bar."""
        if not self._disable and self._stream.isatty():
            print(what, file=self._stream)

    def begin(self) -> None:
        """Draw the bar."""
        due = self._audit.estimate()
        self._cells = due.cells
        total = sum(due.rows.values())
        self._bar = tqdm(
            file=self._stream, disable=self._disable, total=total, unit=" rows", dynamic_ncols=True, smoothing=0.05
        )

    def __call__(self, cell: Cell, state: Progress) -> None:
        """Show where a cell stands."""
        self._bar.set_postfix_str(f"{self._done} of {self._cells} cells, {cell.id}", refresh=False)
        self._bar.update(state.rows - self._begun.get(cell.id, 0))
        self._begun[cell.id] = state.rows

    def end(self, outcome: Outcome) -> None:
        """Count a cell as done: what it did not use of its worst case is not to come any more."""
        self._done += 1
        self._bar.update(sum(self._audit.plan.worst[outcome.id].values()) - self._begun.get(outcome.id, 0))
        if outcome.error is not None:
            self._bar.write(f"{outcome.id} failed: {outcome.error}", file=self._stream)

    def certified(self, name: str, error: str | None) -> None:
        """Count a certified model."""
        self._bar.update(sum(each.rows for each in self._audit.certifications if each.system.id == name))
        if error is not None:
            self._bar.write(f"{name} was not certified: {error}", file=self._stream)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def show_plan(plan: Plan, console: Console) -> None:
    """What will be run, and what cannot be."""
    table = _table("plan", "model", "defense", "attacks", "cells", "worst-case rows")
    for system in plan.systems:
        cells = plan.of(system)
        attacks = ", ".join(dict.fromkeys(cell.attack for cell in cells))
        table.add_row(system.model.name, system.defense.name, attacks, str(len(cells)), f"{plan.rows(cells):,}")
    console.print(table)
    for reason in dict.fromkeys(f"{e.cell.attack} under {e.cell.threat}: {e.reason}" for e in plan.excluded):
        console.print(f"not run: {reason}", highlight=False, markup=False, soft_wrap=True)


def show_estimate(cost: Estimate, console: Console) -> None:
    """What is still to be asked at most."""
    words = [f"{cost.cells} cells to run, at most {sum(cost.rows.values()):,} rows"]
    words += [f"({', '.join(f'{phase} {n:,}' for phase, n in cost.rows.items())})"] if cost.rows else []
    if cost.price is not None:
        words.append(f"at most {cost.price:,.2f} {cost.currency}".rstrip())
    if cost.seconds is not None:
        words.append(f"about {cost.seconds / 60:.1f} min at the black boxes' speed alone, if all budgets are used up")
    else:
        words.append("time unknown before the pre-flight (or give rows_per_second)")
    console.print(", ".join(words).replace(", (", " ("), highlight=False)


def show_preflight(audit: Audit, console: Console) -> None:
    """What the pre-flight saw, each flag with its meaning, and what that makes of the estimate."""
    rows = sum(sum(seen["rows"].values()) for seen in audit.seen.values())
    console.print(f"pre-flight: {rows:,} rows (ledger: verify)", highlight=False)
    for flag in flags_of({name: seen["flags"] for name, seen in audit.seen.items()}):
        console.print(f"\n{flag['code']}: {'; '.join(flag['where'])}", highlight=False, markup=False, soft_wrap=True)
        for title in ("raised_if", "meaning", "what_to_do"):
            console.print(
                f"    {title.replace('_', ' ')}: {flag[title]}", highlight=False, markup=False, soft_wrap=True
            )
    console.print()
    show_estimate(audit.estimate(), console)


def show(result: AuditResult, console: Console) -> None:
    """The rows and the thresholds."""
    table = _table("robust accuracy under the best known attack for each image", "model", "defense", "threat", "budget")
    for title in ("clean", "robust", "95 % interval", "best attack"):
        table.add_column(title)
    for row in result.document["rows"]:
        clean, robust = row["clean_accuracy"], row["robust_accuracy"]
        place = [row["model"], row["defense"], row["threat"], str(row["budget"])]
        if robust is None:
            table.add_row(*place, "-", "no results", "-", "-")
            continue
        interval = f"{robust['low']:.1%} to {robust['high']:.1%}"
        mark = "" if row["complete"] else " at most"
        table.add_row(
            *place, f"{clean['share']:.1%}", f"{robust['share']:.1%}{mark}", interval, row["best_attack"] or "-"
        )
    console.print(table)
    for verdict in result.document["verdicts"]:
        word = "holds" if verdict["holds"] else f"MISSED: {complaint(verdict)}"
        console.print(
            f"{verdict['threshold']}: {verdict['where']}: {word}", highlight=False, markup=False, soft_wrap=True
        )
    failed = sum(cell["status"] != "done" for cell in result.document["cells"])
    if failed:
        console.print(
            f"{failed} of {len(result.document['cells'])} cells have no results; the same command runs them again"
        )
    console.print(f"written to {result.folder}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, box=SIMPLE_HEAD, title_justify="left")


if __name__ == "__main__":
    sys.exit(main())
