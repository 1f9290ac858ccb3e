"""From an audit's file to cells: which can be run, which cannot and why, and what they cost at most. No query is asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from robustbox import inputs, setting
from robustbox.api import worst_case
from robustbox.config import AttackConfig
from robustbox.errors import InputError
from robustbox.protocol import BlackBox, Defense

from .cells import Cell
from .spec import AttackEntry, AuditSpec, DefenseEntry, ModelEntry, ThreatEntry, matches
from .world import World


@dataclass(frozen=True)
class System:
    """A model behind a defense: what is audited."""

    id: str
    model: ModelEntry
    defense: DefenseEntry

    def recipes(self) -> list[Defense]:
        """What stands around the model, outermost first."""
        return inputs.resolve_defenses(self.defense.defense, self.defense.options)


@dataclass(frozen=True)
class Excluded:
    """A cell that cannot be run, and why."""

    cell: Cell
    reason: str


@dataclass
class Plan:
    """What an audit will do.

    Attributes:
        systems: the defended models, in order.
        cells: what is run, in order.
        excluded: what cannot be.
        worst: rows by ledger that each cell costs at most, by its id.
    """

    systems: list[System] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    excluded: list[Excluded] = field(default_factory=list)
    worst: dict[str, dict[str, int]] = field(default_factory=dict)

    def of(self, system: System) -> list[Cell]:
        """A system's cells."""
        return [c for c in self.cells if (c.model, c.defense) == (system.model.name, system.defense.name)]

    def rows(self, cells: list[Cell]) -> int:
        """The rows that cells cost at most."""
        return sum(sum(self.worst[cell.id].values()) for cell in cells)

    def exclude(self, cell: Cell, reason: str) -> None:
        """Take a cell out, as it turned out that it cannot be run."""
        self.cells.remove(cell)
        self.excluded.append(Excluded(cell, reason))


def make_plan(spec: AuditSpec, world: World, out: Path) -> Plan:
    """The plan of an audit that is written to the folder `out`.

    Raises:
        InputError: a name that does not exist, options that an attack or defense does not take, images that a model does
            not take, or nothing at all that can be run.
    """
    for entry in spec.attacks:
        inputs.resolve_attack(entry.attack, entry.options)
    for defense in spec.defenses:
        inputs.resolve_defenses(defense.defense, defense.options)
    plan = Plan()
    for model in spec.models:
        box, images, labels = images_of(model, spec, world)
        for defense in spec.defenses:
            if not matches(model.name, defense.models):
                continue
            plan.systems.append(System(_slug(model.name, defense.name), model, defense))
            for cell in _cells(spec, model, defense, len(images), out):
                try:
                    everything, classes = world.everything(cell.config.data or "", box)
                    arguments = setting.arguments(cell.config, box, everything, classes, len(images))
                    plan.worst[cell.id] = worst_case(box, images, labels, **arguments)
                except InputError as error:
                    plan.excluded.append(Excluded(cell, " ".join(str(error).split())))
                else:
                    plan.cells.append(cell)
    ids = [system.id for system in plan.systems]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise InputError(f"two defended models would share the file name {twice}: give one of them another `name`")
    if not plan.cells:
        why = f": {plan.excluded[0].cell.id}: {plan.excluded[0].reason}" if plan.excluded else ""
        raise InputError(f"no attack of this audit can be run{why}")
    return plan


def images_of(model: ModelEntry, spec: AuditSpec, world: World) -> tuple[BlackBox, Tensor, Tensor]:
    """A model's black box, and the images and labels that it is attacked on.

    Raises:
        InputError: one does not exist, or they do not go together.
    """
    box = world.box(model.model, spec.device)
    everything, classes = world.everything(data_of(model), box)
    there = len(everything)
    n = min(spec.images, there) if model.images is None else setting.count(model.images, there)
    inputs.check_images(everything[:n], box)
    inputs.check_labels(classes[:n], n, box.classes)
    return box, everything[:n], classes[:n]


def data_of(model: ModelEntry) -> str:
    """The name of the data set that a model is attacked on."""
    return model.data or setting.own_data(model.model)


def _cells(spec: AuditSpec, model: ModelEntry, defense: DefenseEntry, n: int, out: Path) -> Iterator[Cell]:
    for threat in spec.threats:
        for budget in spec.budgets:
            for attack in spec.attacks:
                wanted = matches(model.name, attack.models) and matches(defense.name, attack.defenses)
                if wanted and matches(threat.name, attack.threats) and matches(model.name, threat.models):
                    yield _cell(spec, model, defense, attack, threat, budget, n, out)


def _cell(
    spec: AuditSpec,
    model: ModelEntry,
    defense: DefenseEntry,
    attack: AttackEntry,
    threat: ThreatEntry,
    budget: int,
    n: int,
    out: Path,
) -> Cell:
    accounts = threat.accounts if attack.accounts is None else attack.accounts
    config: dict[str, Any] = {
        "model": model.model,
        "data": data_of(model),
        "images": n,
        "attack": attack.attack,
        "attack_options": dict(attack.options),
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "targets": threat.targets,
        "budget": budget,
        "defense": defense.defense,
        "defense_options": dict(defense.options),
        "knowledge": threat.knowledge if attack.knowledge is None else attack.knowledge,
        "levels": model.levels if threat.levels is None else threat.levels,
        "seed": spec.seed,
        "device": spec.device,
        "keep_going": threat.keep_going,
        "max_rows": spec.max_rows,
        "eot": threat.eot if attack.eot is None else attack.eot,
        "accounts": None if accounts == "any" else accounts,
    }
    names = (model.name, defense.name, attack.name, threat.name)
    digest = hashlib.sha256(json.dumps([names, config], sort_keys=True).encode()).hexdigest()[:8]
    identity = f"{_slug(*names)}.{budget}.{digest}"
    return Cell(identity, *names, budget, AttackConfig(**config, out=str(out / "cells" / identity)))


def _slug(*names: str) -> str:
    return ".".join(re.sub(r"[^\w+-]+", "-", name).strip("-") for name in names)
