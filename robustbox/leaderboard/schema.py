"""What an entry must look like: checked before it is shown, because people edit and review these files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from robustbox.errors import InputError
from robustbox.leaderboard.entries import SCHEMA
from robustbox.leaderboard.sources import KIND
from robustbox.results import share_of

_TEXT, _NUMBER, _MAYBE = (str,), (int, float), (type(None),)
_SHARE = {"hits": (int,), "of": (int,), "share": _NUMBER + _MAYBE, "low": _NUMBER, "high": _NUMBER}
_RECIPE = {"name": _TEXT, "options": (dict,)}
_MEDIAN = {"value": _NUMBER + _MAYBE, "low": _NUMBER + _MAYBE, "high": _NUMBER + _MAYBE}
_ATTACK = {
    "attack": _RECIPE,
    "knowledge": _TEXT,
    "epsilon": _NUMBER + _MAYBE,
    "eot": (int,),
    "accounts": (int, type(None)),
    "budget": (int,),
    "total_budget": (int, type(None)),
    "seed": (int,),
    "robust_accuracy": {"*": _SHARE},
    "detected": (_SHARE, None),
    "rejected": (int,),
    "queries": (int,),
    "accounts_burnt": (int, type(None)),
    "errors": (int,),
    "run": {"folder": _TEXT, "config_sha256": _TEXT, "results_sha256": _TEXT, "adversarials_sha256": _TEXT},
    "config": (dict,),
}
_THREAT = {
    "norm": _TEXT,
    "epsilon": _NUMBER + _MAYBE,
    "targeted": (bool,),
    "levels": (int, type(None)),
    "knowledge": _TEXT,
    "budgets": [(int,)],
    "adaptive": {"needs": [_TEXT], "missing": [_TEXT]},
    "robust_accuracy": {"*": _SHARE},
    "median_distance": {"*": _MEDIAN},
    "attacks": [_ATTACK],
}
_CERTIFIED = {
    "norm": _TEXT,
    "sigma": _NUMBER,
    "n": (int,),
    "alpha": _NUMBER,
    "radii": [{"radius": _NUMBER, "accuracy": _SHARE}],
    "certified_sha256": _TEXT,
}
_COST = {"passes_per_query": _NUMBER, "time_ratio": _NUMBER, "milliseconds_per_query": _NUMBER, "device": _TEXT}
_ENTRY = {
    "kind": _TEXT,
    "schema": (int,),
    "name": _TEXT,
    "about": {"authors": _TEXT + _MAYBE, "paper": _TEXT + _MAYBE, "note": _TEXT + _MAYBE},
    "model": {"name": _TEXT, "weights_sha256": _TEXT + _MAYBE, "parameters": (int, type(None))},
    "defense": [_RECIPE],
    "stochastic": (bool,),
    "stateful": (bool,),
    "images": {"count": (int,), "sha256": _TEXT},
    "clean_accuracy": _SHARE,
    "false_positives": (_SHARE, None),
    "certified": (_CERTIFIED, None),
    "cost": (_COST, None),
    "threats": [_THREAT],
}


def check_entry(entry: Any) -> None:
    """Refuse an entry that docs/leaderboard-entries.md does not describe, or whose intervals are not those of its counts.

    Raises:
        InputError: where it is wrong.
    """
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or entry.get("kind") != KIND:
        raise InputError(f"no entry of a leaderboard: `kind` is not '{KIND}'")
    if entry.get("schema") != SCHEMA:
        raise InputError(f"entry {name} has schema {entry.get('schema')}, this robustbox reads schema {SCHEMA}")
    if wrong := _wrong(entry, _ENTRY, ""):
        raise InputError(f"entry {name}: {wrong}")
    if any(c in entry["name"] for c in "/\\") or entry["name"].startswith("."):
        raise InputError(f"entry {name}: the name must do as a file's name")
    for place, share in _shares(entry, ""):
        if not place.startswith("false_positives"):  # Clopper-Pearson, the audit's
            due = share_of(share["hits"], share["of"])
            if not all(_close(share[key], due[key]) for key in due):
                raise InputError(f"entry {name}: {place} is not what {share['hits']} of {share['of']} make")


def _wrong(value: Any, shape: Any, place: str) -> str | None:
    """What is wrong with a value, or None; a shape is (types), {key: shape}, {"*": shape}, [shape] or (shape, None)."""
    here = place.lstrip(".") or "the entry"
    if isinstance(shape, tuple) and shape[-1] is None:
        return None if value is None else _wrong(value, shape[0], place)
    if isinstance(shape, tuple):
        fine = type(value) in shape and not (isinstance(value, float) and not math.isfinite(value))
        names = " or ".join("null" if each is type(None) else each.__name__ for each in shape)
        return None if fine else f"{here} must be {names}, not {value!r}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{here} must be a list"
        return next((bad for k, item in enumerate(value) if (bad := _wrong(item, shape[0], f"{place}[{k}]"))), None)
    if not isinstance(value, dict):
        return f"{here} must be an object"
    expected = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
    if missing := [key for key in expected if key not in value]:
        return f"{here} lacks {missing[0]}"
    if unknown := [key for key in value if key not in expected]:
        return f"{here} has {unknown[0]}, which nobody knows"
    return next((bad for key, item in value.items() if (bad := _wrong(item, expected[key], f"{place}.{key}"))), None)


def _shares(value: Any, place: str) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, dict) and set(value) == set(_SHARE):
        return [(place.lstrip("."), value)]
    if isinstance(value, dict):
        return [found for key, item in value.items() if key != "config" for found in _shares(item, f"{place}.{key}")]
    if isinstance(value, list):
        return [found for k, item in enumerate(value) for found in _shares(item, f"{place}[{k}]")]
    return []


def _close(one: float | None, two: float | None) -> bool:
    return one == two if one is None or two is None else math.isclose(one, two, abs_tol=1e-9)
