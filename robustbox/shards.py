"""Shards of an audit's cell: some of its images each, run apart and put together again into the run that it would have been.

An image's random stream comes from (seed, image, attack) and its accounts are its own, so it does not matter who its
neighbours are, as far as the black box answers row by row and remembers no more than what one account asked.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbox import inputs, setting
from robustbox.api import conduct, prepare
from robustbox.auditing.asked import count_rows
from robustbox.auditing.cells import FAILURE, Cell
from robustbox.auditing.world import World
from robustbox.events import EventLog
from robustbox.folder import JOURNAL, RunFolder, is_complete, read_run, replace_file
from robustbox.identity import sha256
from robustbox.report import write_report
from robustbox.results import AttackResult

_SIZE = "images-a-shard"


@dataclass(frozen=True)
class Shard:
    """The images from `start` up to `stop` of a cell."""

    cell: Cell
    start: int
    stop: int

    @property
    def folder(self) -> Path:
        """Its run's folder: beside the cells, as the cell's own is for the whole."""
        return _room(self.cell) / f"{self.start:06d}-{self.stop:06d}"


def cut(cell: Cell, world: World, size: int) -> list[Shard]:
    """The shards of a cell, of `size` images each; none where it must be run whole, or is being run so already.

    A cell is whole where its images share something: what the attack learns, a total budget, a history of all clients, a model
    that remembers or draws, a remote service (whose cost is counted by whoever asks), an image that comes twice (and has two
    accounts).
    """
    room, config = _room(cell), cell.config
    if (room / _SIZE).exists():
        size = int((room / _SIZE).read_text())  # as it was begun
    elif (cell.folder / JOURNAL).exists():
        return []
    images, _, n = _images(cell, world)
    box = world.box(config.model, config.device)
    defenses = inputs.resolve_defenses(config.defense, config.defense_options)
    shared = inputs.resolve_attack(config.attack, config.attack_options).shares
    shared |= any(getattr(recipe, "scope", "account") != "account" for recipe in defenses)
    own = box.inner is not None or box.stochastic or box.stateful or box.describe().get("kind") == "remote"
    twice = len({sha256(image) for image in images[:n]}) < n
    if n <= size or config.total_budget is not None or shared or own or twice:
        return []
    room.mkdir(parents=True, exist_ok=True)
    replace_file(room / _SIZE, str(size).encode())
    return [Shard(cell, start, min(start + size, n)) for start in range(0, n, size)]


def run_shard(shard: Shard, world: World) -> None:
    """Run a shard, or go on with it; one that is done is not run again."""
    if is_complete(shard.folder):
        return
    config = shard.cell.config
    images, labels, n = _images(shard.cell, world)
    box, part = world.box(config.model, config.device), slice(shard.start, shard.stop)
    arguments = setting.arguments(config, box, images, labels, n)
    if isinstance(arguments["targets"], list):
        arguments["targets"] = arguments["targets"][part]
    contest = prepare(box, images[part], labels[part], **arguments)
    with RunFolder(shard.folder, contest.config()) as folder:
        count_rows(contest, folder, shard.cell.folder)
        conduct(contest, folder, need_one=False)  # others may have one


def merge(cell: Cell, shards: Sequence[Shard], world: World) -> None:
    """Put the shards of a cell, all of them done, together in the cell's folder, and remove them."""
    images, _, n = _images(cell, world)
    result = joined([result_of(*read_run(shard.folder)) for shard in shards])
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / FAILURE).unlink(missing_ok=True)
    with RunFolder(cell.folder, cell.config.what_to_run(), fresh=True) as folder:
        assert folder.journal is not None
        for shard in shards:
            log = EventLog(shard.folder / JOURNAL)
            folder.journal.absorb(log.read(verify=True))
            log.close()
        folder.write(result)
        write_report(folder.path, images[:n])
        folder.end()
    shutil.rmtree(_room(cell))
    if not any(_room(cell).parent.iterdir()):
        _room(cell).parent.rmdir()


def joined(results: Sequence[AttackResult]) -> AttackResult:
    """The result of several runs of one setting on different images as one, their images in order."""
    first = results[0]
    fields: dict[str, Any] = {}
    for name in AttackResult.__dataclass_fields__:
        parts = [getattr(result, name) for result in results]
        if isinstance(parts[0], np.ndarray):
            fields[name] = np.concatenate(parts)
        elif isinstance(parts[0], Tensor):
            fields[name] = torch.cat(parts)
        elif isinstance(parts[0], list):
            fields[name] = [entry for part in parts for entry in part]
    metas = [result.meta for result in results]
    seconds = sum((Counter(meta["seconds"]) for meta in metas), Counter[str]())
    ledger = sum((Counter(result.ledger) for result in results), Counter[str]())
    asked = ledger["attack"] + ledger["calibrate"]
    meta = {
        **first.meta,
        "seconds": {phase: seconds[phase] for phase in first.meta["seconds"]},
        "rows_per_second": asked / seconds["attack"] if seconds["attack"] else None,
        "journal": {
            "sessions": 1 + sum(meta["journal"]["sessions"] - 1 for meta in metas),
            "in_flight": sum(meta["journal"]["in_flight"] for meta in metas),
        },
        "pipeline": [summed_up(stages) for stages in zip(*(meta["pipeline"] for meta in metas), strict=True)],
        "images": [image for meta in metas for image in meta["images"]],
    }
    return AttackResult(**fields, ledger=dict(ledger), epsilon=first.epsilon, meta=meta)


def summed_up(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a defense says of itself after several runs, as one: counts are added up, means weighed by the rows."""
    first = dict(stages[0])
    if "statistics" not in first:
        return first
    its = [stage["statistics"] for stage in stages]
    rows = [each["rows"] for each in its]
    for name, value in first["statistics"].items():
        values = [each[name] for each in its]
        if isinstance(value, Mapping):
            merged: Any = {key: each for part in values for key, each in part.items()}
        elif isinstance(value, int):
            merged = sum(values)
        else:
            merged = float(np.average(values, weights=rows)) if sum(rows) else 0.0
        first["statistics"] = {**first["statistics"], name: merged}
    return first


def result_of(document: Mapping[str, Any], adversarials: Tensor) -> AttackResult:
    """The result that a run's folder holds (`robustbox.folder.document_of` the other way round)."""
    images = document["images"]

    def column(name: str, kind: type) -> Any:
        return np.array([np.nan if image[name] is None else image[name] for image in images], dtype=kind)

    kinds = {
        bool: ["success", "clean_correct", "success_any", "success_fresh", "success_clean", "success_undefended"],
        np.int64: ["queries", "first_success", "accounts_burnt"],
        np.float64: ["distance"],
    }
    columns = {name: column(name, kind) for kind, names in kinds.items() for name in names}
    meta = {k: v for k, v in document.items() if k not in ("schema", "written", "complete", "summary", "images")}
    known = ("sha256", "label", "target")
    return AttackResult(
        **columns,
        fresh_draws=np.array([image["fresh"]["of"] for image in images], dtype=np.int64),
        fresh_fooled=np.array([image["fresh"]["hits"] for image in images], dtype=np.int64),
        adversarials=adversarials,
        ledger=dict(document["summary"]["ledger"]),
        hits=[image.get("hits") for image in images],
        first_hits=[image.get("first_hit") for image in images],
        refusals=[[(a, b) for a, b in image["refusals"]] for image in images],
        stop_reasons=[image["stop_reason"] for image in images],
        errors=[image["error"] for image in images],
        traces=[[(query, far) for query, far in image["trace"]] for image in images],
        epsilon=document["epsilon"],
        meta={**meta, "images": [{key: image[key] for key in known} for image in images]},
    )


def _room(cell: Cell) -> Path:
    return cell.folder.parent.parent / "shards" / cell.folder.name


def _images(cell: Cell, world: World) -> tuple[Tensor, Tensor, int]:
    """All images and labels of a cell's data set, and how many of them are attacked."""
    box = world.box(cell.config.model, cell.config.device)
    images, labels = world.everything(cell.config.data or setting.own_data(cell.config.model), box)
    return images, labels, setting.count(cell.config.images, len(images))
