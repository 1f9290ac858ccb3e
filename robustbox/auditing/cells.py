"""One cell of an audit: one attack on one black box, in a run's folder of its own.

An executor takes cells and runs each by `run_cell`, here or elsewhere: a cell is plain data, and what comes of it stands in
its folder (`cells/ID` of the audit's).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbox import setting
from robustbox.api import conduct, prepare
from robustbox.config import AttackConfig
from robustbox.folder import RESULTS, open_run
from robustbox.loop import Progress

from .asked import count_rows
from .world import World

FAILURE = "failure.json"
"""Stands in the folder of a cell that failed, until it is run again."""


@dataclass(frozen=True)
class Cell:
    """One place in the matrix.

    Args:
        id: what tells it from all others; the same whenever the same things are run in the same way.
        model, defense, attack, threat: names in the audit's file.
        budget: queries an image.
        config: what to run; its `out` is the cell's folder.
    """

    id: str
    model: str
    defense: str
    attack: str
    threat: str
    budget: int
    config: AttackConfig

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.out or "")

    def where(self) -> dict[str, Any]:
        """Its place in the matrix."""
        return {name: getattr(self, name) for name in ("model", "defense", "attack", "threat", "budget")}


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: None or an error, and the seconds that it took (0 where it was done before)."""

    id: str
    error: str | None
    seconds: float


Watch = Callable[[Cell, Progress], None]
Work = Callable[[Cell], Outcome]
Executor = Callable[[Sequence[Cell], Work, World], Iterator[Outcome]]
"""Runs cells, each by the function that it is given (or elsewhere by `run_cell(cell, world)`), and yields their outcomes in any
order, each as soon as it is there."""


def in_turn(cells: Sequence[Cell], work: Work, world: World) -> Iterator[Outcome]:
    """The executor of one process: one cell after the other."""
    yield from map(work, cells)


def run_cell(cell: Cell, world: World, watch: Watch | None = None) -> Outcome:
    """Run a cell, unless it is done. One that was stopped goes on where its folder's journal ends, or starts over without one.

    Whatever goes wrong is written into its folder and returned; only an interrupt is passed on.
    """
    if read_cell(cell.folder) is not None:
        return Outcome(cell.id, None, 0.0)
    start = time.perf_counter()
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / FAILURE).unlink(missing_ok=True)
    if not (cell.folder / "journal.sqlite").exists():
        shutil.rmtree(cell.folder)
    try:
        _attack(cell, world, watch)
        error = None
    except Exception as trouble:  # one cell that fails is one cell less, not the end of the audit
        error = " ".join(f"{type(trouble).__name__}: {trouble}".split())
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / FAILURE).write_text(json.dumps({"error": error}) + "\n", encoding="utf-8")
    return Outcome(cell.id, error, time.perf_counter() - start)


def _attack(cell: Cell, world: World, watch: Watch | None) -> None:
    config = cell.config
    box = world.box(config.model, config.device)
    everything, classes = world.everything(config.data or setting.own_data(config.model), box)
    n = setting.count(config.images, len(everything))
    arguments = setting.arguments(config, box, everything, classes, n)
    with open_run(cell.folder, config.what_to_run()) as folder:
        contest = prepare(box, everything[:n], classes[:n], **arguments)
        count_rows(contest, folder, cell.folder)
        conduct(contest, folder, progress=None if watch is None else lambda state: watch(cell, state))


def read_cell(folder: Path) -> dict[str, Any] | None:
    """The results of a cell that is done; None where it failed, was stopped, or never ran."""
    if (folder / FAILURE).exists() or not (folder / RESULTS).exists():
        return None
    document: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    stopped = any(image["stop_reason"] == "stopped" for image in document["images"])
    return None if stopped or document.get("complete") is False else document


def read_failure(folder: Path) -> str | None:
    """Why a cell failed; None where it did not."""
    path = folder / FAILURE
    return str(json.loads(path.read_text(encoding="utf-8"))["error"]) if path.exists() else None
