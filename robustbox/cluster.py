"""Audits on many machines: cells, and images within a cell, run as tasks of a Ray cluster (docs/cluster.md).

Every task works in a folder of its own with a journal of its own. A task whose worker dies is started again elsewhere and goes
on from there. All machines see the audit's folder under one path.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustbox.auditing.cells import FAILURE, Cell, Outcome, Work, run_cell
from robustbox.auditing.world import World
from robustbox.errors import InputError
from robustbox.folder import replace_file
from robustbox.shards import Shard, cut, merge, run_shard


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """An executor of an audit's cells (`robustbox.run_audit(..., executor=Cluster())`).

    Args:
        address: of a Ray cluster (as `ray.init` takes it), or `local`: one on this machine, for the length of the audit.
        images: images of a cell that one task attacks, where a cell can be cut.
        cpus, gpus: what a task asks of its machine; parts of a GPU are shared.
        retries: how often a task is started again after its worker has died.
        workers: tasks at once on a local cluster; default: as many as there are cores.
    """

    address: str = "local"
    images: int = 100
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3
    workers: int | None = None

    def __call__(self, cells: Sequence[Cell], work: Work, world: World) -> Iterator[Outcome]:
        """Run cells, each whole or in shards; yields the outcome of each as soon as it is there.

        Raises:
            InputError: as `connect`.
        """
        ray = self.connect()
        try:
            yield from self._run(ray, [_absolute(cell) for cell in cells], world)
        finally:
            ray.shutdown()  # a local cluster ends, and on another one the tasks that are still running

    def connect(self) -> Any:
        """Connect to the cluster, which the executor does too: before it, nothing was asked yet, and errors cost no query.

        Raises:
            InputError: Ray is not installed, there is no cluster at the address, or no machine in it can hold a task.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise InputError("--cluster needs Ray: pip install 'robustbox[cluster]'") from None
        if ray.is_initialized():
            return ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address == "local":
                cores = math.ceil(self.cpus * self.workers) if self.workers else os.cpu_count()
                ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
            else:
                ray.init(self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            hint = "" if self.address == "local" else " (if it asks for a token, set RAY_AUTH_MODE=token)"
            raise InputError(f"there is no Ray cluster at {self.address}{hint}: {error}") from error
        self._check(ray)
        return ray

    def _check(self, ray: Any) -> None:
        """Refuse tasks that no machine of the cluster can hold: they would wait for ever."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        asked = {"CPU": self.cpus, "GPU": self.gpus}
        if not any(all(machine.get(kind, 0) >= n for kind, n in asked.items()) for machine in machines):
            most = ", ".join(f"{max(m.get(kind, 0) for m in machines):g} {kind}s" for kind in asked)
            ray.shutdown()
            raise InputError(
                f"a worker is to have {self.cpus:g} CPUs and {self.gpus:g} GPUs, but no machine of the cluster at "
                f"{self.address} has them (at most {most}): ask for less, or start such a machine first"
            )

    def _run(self, ray: Any, cells: Sequence[Cell], world: World) -> Iterator[Outcome]:
        asks = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": self.retries}
        task, shared = ray.remote(**asks)(_work), ray.put(world)
        shards = {cell.id: cut(cell, world, self.images) for cell in cells}
        pieces: dict[str, Sequence[Cell | Shard]] = {cell.id: shards[cell.id] or [cell] for cell in cells}
        owner = {task.remote(piece, shared, os.getcwd()): cell for cell in cells for piece in pieces[cell.id]}
        left = {cell.id: len(pieces[cell.id]) for cell in cells}
        found: dict[str, list[Outcome]] = {cell.id: [] for cell in cells}
        pending = list(owner)
        while pending:
            (done,), pending = ray.wait(pending)
            cell = owner[done]
            found[cell.id].append(self._outcome(ray, done, cell))
            left[cell.id] -= 1
            if not left[cell.id]:
                yield _concluded(cell, shards[cell.id], found[cell.id], world)

    def _outcome(self, ray: Any, done: Any, cell: Cell) -> Outcome:
        try:
            outcome: Outcome = ray.get(done)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:200]
            return Outcome(cell.id, f"its worker died {self.retries + 1} times: {reason}", 0.0)
        return outcome


def _work(piece: Cell | Shard, world: World, where: str) -> Outcome:
    """What a worker does: the driver's relative paths mean the same to it."""
    if Path(where).is_dir():
        os.chdir(where)
    if isinstance(piece, Cell):
        return run_cell(piece, world)
    start = time.perf_counter()
    try:
        run_shard(piece, world)
        error = None
    except Exception as trouble:  # one shard that fails is one cell less, not the end of the audit
        error = " ".join(f"{type(trouble).__name__}: {trouble}".split())
    return Outcome(piece.cell.id, error, time.perf_counter() - start)


def _concluded(cell: Cell, shards: list[Shard], outcomes: list[Outcome], world: World) -> Outcome:
    """The outcome of a cell whose pieces are all done; what failed stands in its folder."""
    error = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    if error is None and shards:
        merge(cell, shards, world)
    elif error is not None and not (cell.folder / FAILURE).exists():
        cell.folder.mkdir(parents=True, exist_ok=True)
        replace_file(cell.folder / FAILURE, (json.dumps({"error": error}) + "\n").encode())
    return Outcome(cell.id, error, sum(outcome.seconds for outcome in outcomes))


def _absolute(cell: Cell) -> Cell:
    return replace(cell, config=replace(cell.config, out=str(cell.folder.absolute())))
