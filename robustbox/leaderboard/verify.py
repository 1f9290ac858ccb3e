"""`--verify ENTRY`: hold an entry against the runs that it names, and these against the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustbox.errors import InputError, ModelError
from robustbox.leaderboard.entries import build
from robustbox.leaderboard.rebuild import ask_again
from robustbox.leaderboard.schema import check_entry
from robustbox.leaderboard.sources import Run, Sources, find, read_json


def verify(path: Path, folders: Sequence[Path]) -> list[str]:
    """What is not as an entry says, in sentences; an empty list where everything is.

    The files of its runs must have the hashes that it names; its adversarials must do on the model and its defenses, built
    again, what their runs say; and its figures must be those that the runs make.

    Args:
        path: the entry.
        folders: where its runs are looked for.

    Raises:
        InputError: it is no entry.
    """
    entry = read_json(path)
    check_entry(entry)
    sources = find(folders)
    hashes = {tuple(run.hashes().values()): run for run in sources.runs}
    wanted = {_hashes(a): a["run"]["folder"] for threat in entry["threats"] for a in threat["attacks"]}
    missing = [its for its in wanted if its not in hashes]  # by hash: folders under several roots may have one name
    wrong = [_why_missing(wanted[its], its, sources.runs) for its in missing]
    runs = [hashes[its] for its in wanted if its in hashes]
    for run in runs:
        try:
            wrong += [f"{run.name}: {line}" for line in ask_again(run)]
        except (InputError, ModelError) as error:
            wrong.append(f"{run.name}: {error}")
    if not missing:
        wrong += _figures(entry, runs, sources)
    return wrong


def _hashes(attack: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(attack["run"][name] for name in ("config_sha256", "results_sha256", "adversarials_sha256"))


def _why_missing(folder: str, hashes: tuple[str, ...], runs: Sequence[Run]) -> str:
    for run in runs:
        changed = [n for (n, h), due in zip(run.hashes().items(), hashes, strict=True) if h != due]
        if 0 < len(changed) < len(hashes):
            return f"{folder}: {' and '.join(changed)} of {run.path} differ from the entry's"
    return f"{folder}: no run with its hashes was found"


def _figures(entry: Mapping[str, Any], runs: Sequence[Run], sources: Sources) -> list[str]:
    """Where the entry differs from the one that its runs make."""
    radii: dict[str, set[float]] = {}
    for threat in entry["threats"]:
        if threat["epsilon"] is not None:
            radii.setdefault(threat["norm"], set()).add(threat["epsilon"])
    own = Sources(list(runs), sources.certificates, sources.benign)
    made = list(build(own, radii).values())
    if len(made) != 1:
        return ["its runs are of several models, defenses or sets of images"]
    loose = ("name", "about", "cost", "folder")
    wrong = differences(_without(entry, loose), _without(made[0], loose), "")
    return [f"{line} in the entry, by its runs" for line in wrong]


def differences(one: Any, two: Any, place: str) -> list[str]:
    """Where two JSON values differ: `place: this, not that`."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(set(one) | set(two))
        return [line for k in keys for line in differences(one.get(k), two.get(k), f"{place}.{k}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [
            line for k, pair in enumerate(zip(one, two, strict=True)) for line in differences(*pair, f"{place}[{k}]")
        ]
    if one == two:
        return []
    return [f"{place.lstrip('.')}: {json.dumps(one)[:80]}, not {json.dumps(two)[:80]}"]


def _without(value: Any, keys: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value
