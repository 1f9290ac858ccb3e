"""An audit from its file to its folder: plan, pre-flight, cells, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from robustbox.environment import environment
from robustbox.errors import InputError
from robustbox.folder import AUDIT, finite, locked, replace_file
from robustbox.identity import sha256

from .asked import rows_asked
from .cells import Cell, Executor, Outcome, Watch, in_turn, read_cell, read_failure, run_cell
from .certificates import certifications
from .contents import Contents
from .estimate import Estimate, estimate
from .junit import write_junit
from .loading import load
from .looks import look_once, plain_json, read_asked
from .page import write_audit_page
from .place import check_no_run, check_place
from .plan import Plan, System, make_plan
from .preflight import Subject, most
from .spec import AuditSpec
from .summary import cell_summary, row_summary
from .systems import benign_of, sees, subject_of, system_summary
from .thresholds import rows_of, verdicts
from .world import World

SCHEMA = 1
"""The version of audit.json; it changes when a field changes its meaning or goes."""
DOCUMENT, JUNIT, PAGE = "audit.json", "junit.xml", "report.html"


@dataclass(frozen=True)
class AuditResult:
    """What came of an audit: its folder, and audit.json as docs/audit.md describes it."""

    folder: Path
    document: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every threshold holds."""
        return bool(self.document["passed"])


def run_audit(
    audit: str | Path | dict[str, Any],
    out: str | Path | None = None,
    *,
    models: Mapping[str, Any] | None = None,
    data: Mapping[str, tuple[Any, Any]] | None = None,
    executor: Executor = in_turn,
    watch: Watch | None = None,
) -> AuditResult:
    """Run an audit; what is done already in its folder is not run again.

    Args:
        audit: the file (docs/audit.md), or what such a file holds.
        out: the audit's folder; default: runs/NAME.
        models, data: what names in the file stand for, beside the registered ones: models as `run_attack` takes them, data as
            (images, labels).
        executor: runs the cells; default: one after the other in this process.
        watch: called once a round of an attack with its cell and a `Progress`.

    Raises:
        InputError: bad input, before a query is spent.
    """
    running = Audit(load(audit), out, World(models or {}, data or {}))
    with running:
        running.preflight()
        for _ in running.run(executor, watch):
            pass
        for _ in running.certify():
            pass
        return running.conclude()


class Audit:
    """An audit in its folder, step by step: `preflight`, `run`, `conclude`. As a context manager it keeps others out of there.

    Args:
        spec: what is asked for.
        out: the folder; None is runs/NAME.
        world: what its names stand for.

    Raises:
        InputError: the plan cannot be made (`make_plan`).
    """

    def __init__(self, spec: AuditSpec, out: str | Path | None, world: World) -> None:
        self.spec, self.world = spec, world
        self.folder = Path(out) if out is not None else Path("runs") / spec.name
        self.plan: Plan = make_plan(spec, world, self.folder)
        self.contents = Contents(spec, world)
        self._subjects: dict[str, Subject] = {}
        self._digests: dict[str, str] = {}
        self.certifications = list(certifications(spec, self.plan.systems, self._subject, world, self.folder))
        self.seen: dict[str, dict[str, Any]] = {}

    def check_folder(self) -> None:
        """Check the folder that the audit would be written to; nothing is made.

        Raises:
            InputError: what entering would refuse.
        """
        check_place(self.folder)
        self._check_contents()

    def __enter__(self) -> Audit:
        check_no_run(self.folder)
        self._held = ExitStack()
        self._held.enter_context(locked(self.folder, "audit"))
        self._check_contents()
        text = yaml.safe_dump(self.spec.plain(), sort_keys=False, allow_unicode=True)
        replace_file(self.folder / AUDIT, text.encode())
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _check_contents(self) -> None:
        """Refuse to take what was answered about something else for answers about what is audited."""
        done = [
            (system, system.recipes(), read_cell(cell.folder), cell.folder)
            for system in self.plan.systems
            for cell in self.plan.of(system)
        ]
        done += [(each.system, each.recipes(), each.document(), each.folder) for each in self.certifications]
        for system, recipes, document, folder in done:
            changed = None if document is None else self.contents.changed(system, recipes, document)
            if changed is not None:
                raise InputError(f"{changed} than when {folder} was written: choose another folder")

    def estimate(self, everything: bool = False) -> Estimate:
        """What the cells that are not done (or all) cost at most, as far as it is known by now."""
        due = [each for each in self.certifications if everything or each.document() is None]
        certified = {each.system.id: each.rows for each in due}
        looked = {
            system.id: most(self._subject(system), self.spec.preflight)
            for system in self.plan.systems
            if everything or not self._look(system).exists()
        }
        return estimate(self.spec, self.plan, self.seen, looked, certified, everything)

    def _subject(self, system: System) -> Subject:
        """A defended model as it is looked at; its images are checked once."""
        if system.id not in self._subjects:
            self._subjects[system.id] = subject_of(system, self.spec, self.world)
        return self._subjects[system.id]

    def _look(self, system: System) -> Path:
        """Where it stands what the pre-flight saw of a defended model; elsewhere, where anything about it is another."""
        if system.id not in self._digests:
            subject, entry = self._subject(system), self.spec.preflight
            natural = [sha256(image) for image in subject.natural[: entry.benign]]
            self._digests[system.id] = self.contents.digest(system, asdict(entry), subject.levels, natural)
        return self.folder / "preflight" / f"{system.id}.{self._digests[system.id]}.json"

    def _asked(self, system: System) -> Path:
        """Where the rows are counted of all looks at a defended model."""
        return self.folder / "preflight" / f"{system.id}.rows.json"

    def preflight(self, note: Callable[[System], None] | None = None) -> None:
        """Look at every defended model that was not looked at before, and take out the cells that cannot be run on it."""
        for system in self.plan.systems:
            if note is not None:
                note(system)
            seen = look_once(self._look(system), self._asked(system), self._subject(system), self.spec.preflight)
            self.seen[system.id] = seen
            if seen["benign"] is not None:
                path = self.folder / "benign" / f"{system.id}.json"
                path.parent.mkdir(exist_ok=True)
                replace_file(path, plain_json(benign_of(system, seen["benign"])))
            for cell in self.plan.of(system):
                if seen["scores"] == "none" and sees(cell) != "label":
                    self.plan.exclude(cell, "the black box answers labels only, and this attack needs scores")

    def run(self, executor: Executor = in_turn, watch: Watch | None = None) -> Iterator[Outcome]:
        """Run the cells that are not done; yields the outcome of each."""
        broken = {system.id for system in self.plan.systems if self.seen[system.id]["error"] is not None}
        cells = [cell for s in self.plan.systems if s.id not in broken for cell in self.plan.of(s)]

        def work(cell: Cell) -> Outcome:
            return run_cell(cell, self.world, watch)

        yield from executor([cell for cell in cells if read_cell(cell.folder) is None], work, self.world)

    def certify(self) -> Iterator[tuple[str, str | None]]:
        """Certify what is to be certified and is not yet; yields the id of each defended model, and an error or None."""
        for each in self.certifications:
            if each.document() is None:
                yield each.system.id, each.run()

    def conclude(self) -> AuditResult:
        """Write audit.json, junit.xml and report.html of what stands in the folder by now."""
        document = self.document()
        replace_file(self.folder / DOCUMENT, plain_json(document))
        write_junit(self.folder / JUNIT, document)
        write_audit_page(self.folder / PAGE, document)
        return AuditResult(self.folder, document)

    def document(self) -> dict[str, Any]:
        """audit.json, as docs/audit.md describes it."""
        cells = self.plan.cells
        documents = {cell.id: read_cell(cell.folder) for cell in cells}
        summaries = {cell.id: cell_summary(cell, documents[cell.id], self._failure(cell)) for cell in cells}
        certified = {each.system.id: its for each in self.certifications if (its := each.document()) is not None}
        radii = sorted({t.radius for t in self.spec.thresholds if t.metric == "certified-accuracy"})
        systems = [
            system_summary(s, self.seen[s.id], self.plan.of(s), documents, certified.get(s.id), radii)
            for s in self.plan.systems
        ]
        excluded = [each.cell for each in self.plan.excluded]
        found = verdicts(self.spec.thresholds, cells, documents, summaries, systems, excluded)
        device = torch.device("cuda" if torch.cuda.is_available() and self.spec.device == "auto" else "cpu")
        ledgers = [read_asked(self._asked(s)) or self.seen[s.id]["rows"] for s in self.plan.systems]
        ledgers += [each.ledger() for each in self.certifications]
        ledgers += [{"all": rows_asked(cell.folder, summaries[cell.id]["rows"])} for cell in cells]
        document = {
            "schema": SCHEMA,
            "name": self.spec.name,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.spec.seed,
            "passed": all(verdict["holds"] for verdict in found),
            "systems": systems,
            "rows": [row_summary(its, [documents[cell.id] for cell in its]) for its in rows_of(cells)],
            "cells": [summaries[cell.id] for cell in cells],
            "excluded": [{"id": e.cell.id, **e.cell.where(), "reason": e.reason} for e in self.plan.excluded],
            "verdicts": found,
            "rows_asked": sum(sum(ledger.values()) for ledger in ledgers),
            "worst_case": self.estimate(everything=True).plain(),
            "environment": environment(device),
        }
        return dict(finite(document))

    def _failure(self, cell: Cell) -> str | None:
        where = next(s for s in self.plan.systems if (s.model.name, s.defense.name) == (cell.model, cell.defense))
        error = self.seen.get(where.id, {}).get("error")
        return f"pre-flight: {error}" if error else read_failure(cell.folder)
