"""Finds attacks, defenses, models and data by name, through entry points: the same door for ours and a third party's.

Groups are `robustbox.attacks`, `robustbox.defenses`, `robustbox.trainers` (which make defenses), `robustbox.models` and
`robustbox.data`. Beside each stands a group of schemes (`robustbox.attacks.schemes`, ...): the scheme S answers for every
name `S:REST` by a function that takes REST.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from robustbox.errors import InputError, unknown_name

Kind = Literal["attacks", "defenses", "trainers", "models", "data"]

_ARTICLES: dict[str, str] = {
    "attacks": "attack",
    "defenses": "defense",
    "trainers": "trainer",
    "models": "model",
    "data": "data set",
}


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group. A checkout speaks for itself, so that it works uninstalled and is never stale."""
    found = {entry.name: entry for entry in entry_points(group=group)}
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        groups = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("entry-points", {})
        found |= {name: EntryPoint(name, value, group) for name, value in groups.get(group, {}).items()}
    return dict(sorted(found.items()))


def names(kind: Kind) -> list[str]:
    """The registered names of a kind, sorted, without those of schemes."""
    return list(_entries(f"robustbox.{kind}"))


def schemes(kind: Kind) -> list[str]:
    """The registered schemes of a kind: S serves every name `S:REST`."""
    return list(_entries(f"robustbox.{kind}.schemes"))


def load(kind: Kind, name: str) -> Any:
    """What stands behind a name: the registered object, or for `S:REST` what the scheme's function makes of REST.

    Raises:
        InputError: no such name or scheme (with the nearest names), or its package cannot be imported.
    """
    scheme, colon, rest = name.partition(":")
    group = f"robustbox.{kind}.schemes" if colon else f"robustbox.{kind}"
    entry = _entries(group).get(scheme)
    if entry is None:
        known = [f"{s}:{rest or '...'}" for s in schemes(kind)] + names(kind)
        raise unknown_name(_ARTICLES[kind], name, known)
    try:
        found = entry.load()
    except ImportError as error:
        raise InputError(f"{_ARTICLES[kind]} '{name}' cannot be loaded: {error}") from error
    return found(rest) if colon else found


def describe(kind: Kind) -> dict[str, str]:
    """Every name and scheme of a kind with the first line that what stands behind it says of itself."""
    lines = {}
    for name in [*names(kind), *(f"{scheme}:..." for scheme in schemes(kind))]:
        plain, colon, _ = name.partition(":")
        try:
            found = _entries(f"robustbox.{kind}.schemes" if colon else f"robustbox.{kind}")[plain].load()
        except ImportError as error:
            lines[name] = f"cannot be loaded: {error}"
        else:
            lines[name] = (found.__doc__ or "").strip().partition("\n")[0]
    return lines


def make(kind: Literal["models", "data"], name: str) -> Any:
    """The model or data set of a name: what stands behind a plain name is called, a scheme's function was called already."""
    found = load(kind, name)
    return found if ":" in name else found()
