"""Reads an audit's file, gives every entry a name, and checks that names and patterns mean something."""

from __future__ import annotations

from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from robustbox.defense_file import takes_options
from robustbox.errors import InputError, unknown_name

from .checks import check_values
from .reading import read
from .spec import AttackEntry, AuditSpec, DefenseEntry, ModelEntry, ThreatEntry, Threshold

_SHORTHAND: dict[type, str] = {ModelEntry: "model", DefenseEntry: "defense", AttackEntry: "attack", ThreatEntry: "norm"}


def load(source: str | Path | dict[str, Any]) -> AuditSpec:
    """Read an audit from a YAML file, or from what such a file holds.

    Raises:
        InputError: no such file, no YAML, an unknown or missing field, a value of the wrong type or that means nothing, a
            name given twice, or a pattern that matches nothing.
    """
    content = source if isinstance(source, dict) else _content(Path(source))
    spec = _named(read(AuditSpec, content, "the audit", shorthand=_SHORTHAND))
    for kind in ("models", "attacks", "defenses", "threats", "budgets"):
        if not getattr(spec, kind):
            raise InputError(f"the audit names no {kind}")
    _check_patterns(spec)
    check_values(spec)
    return spec


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the audit file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the audit file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"the audit file {path} must hold fields by name: models, attacks and so on")
    return content


def _named(spec: AuditSpec) -> AuditSpec:
    """The audit with a name for each entry, each only once."""
    models = [replace(entry, name=entry.name or entry.model) for entry in spec.models]
    defenses = [_tidy(entry) for entry in spec.defenses]
    attacks = [replace(entry, name=entry.name or entry.attack) for entry in spec.attacks]
    threats = [replace(entry, name=entry.name or _called(entry)) for entry in spec.threats]
    for entries in (models, defenses, attacks, threats):
        names = [entry.name for entry in entries]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"the name '{twice}' is given twice: tell the entries apart by `name`")
    for each in spec.thresholds:
        if (each.min is None) == (each.max is None):
            raise InputError(f"threshold {each.metric} must have either min or max")
    thresholds = [replace(each, name=each.name or _bound(each)) for each in spec.thresholds]
    if any(budget < 1 for budget in spec.budgets) or len(set(spec.budgets)) < len(spec.budgets):
        raise InputError(f"budgets must be different whole numbers of at least 1, not {spec.budgets}")
    return replace(spec, models=models, defenses=defenses, attacks=attacks, threats=threats, thresholds=thresholds)


def _tidy(entry: DefenseEntry) -> DefenseEntry:
    chain = [entry.defense] if isinstance(entry.defense, str) else list(entry.defense or [])
    chain = [name for name in chain if name != "none"]
    if entry.options and takes_options(chain) is None:
        raise InputError("options of a defense go with exactly one name, alone or among files")
    defense = None if not chain else chain[0] if len(chain) == 1 else chain
    return replace(entry, defense=defense, name=entry.name or "+".join(Path(name).name for name in chain) or "none")


def _called(threat: ThreatEntry) -> str:
    parts = [threat.norm, "" if threat.epsilon is None else f"{threat.epsilon:g}"]
    parts += ["" if threat.targets is None else f"to-{threat.targets}", threat.knowledge or ""]
    parts += [f"{threat.levels}-levels" if threat.levels else "", f"eot-{threat.eot}" if threat.eot > 1 else ""]
    return "-".join(part for part in parts if part)


def _bound(threshold: Threshold) -> str:
    bound = f"at least {threshold.min:g}" if threshold.min is not None else f"at most {threshold.max:g}"
    return f"{threshold.metric} {bound}"


def _check_patterns(spec: AuditSpec) -> None:
    kinds = {
        kind: [entry.name for entry in getattr(spec, kind)] for kind in ("models", "defenses", "attacks", "threats")
    }
    entries: list[Any] = [*spec.defenses, *spec.attacks, *spec.threats, *spec.certify, *spec.thresholds]
    for entry in entries:
        for kind in {f.name for f in fields(entry)} & set(kinds):
            for pattern in getattr(entry, kind):
                if not any(fnmatchcase(name, pattern) for name in kinds[kind]):
                    raise unknown_name(f"{kind} pattern in {entry.name}", pattern, kinds[kind])
    for threshold in spec.thresholds:
        for budget in threshold.budgets or []:
            if budget not in spec.budgets:
                raise InputError(f"threshold {threshold.name}: no budget is {budget}, but {spec.budgets}")
