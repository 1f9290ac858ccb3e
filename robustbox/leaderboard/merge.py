"""Entries that stand on a board already, are given, or are made of runs: which are of the same, and what each is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustbox.errors import InputError

from .entries import defense_key, named_apart

Entry = Mapping[str, Any]


def identity_of(entry: Entry) -> tuple[str, ...]:
    """What an entry is about: a model by its weights, a chain of defenses by their options, images by their hashes."""
    model = entry["model"]
    return model["name"], str(model["weights_sha256"]), defense_key(entry["defense"]), entry["images"]["sha256"]


def merged(before: Sequence[Entry], given: Sequence[Entry], made: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """All entries by name, in order: of those about the same the last one, under the first one's name.

    An entry whose name another one has already, which is about something else, is named apart.

    Args:
        before: those that stand on the board.
        given: those that were named beside runs.
        made: those of the runs.

    Raises:
        InputError: two entries that stand there, or two that are given, differ, and no runs decide between them.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    owners: dict[str, tuple[str, ...]] = {}
    decided = {identity_of(entry) for entry in made}
    for source in (before, given, made):
        seen: dict[tuple[str, ...], Entry] = {}
        for entry in source:
            its = identity_of(entry)
            if (other := seen.setdefault(its, entry)) != entry and its not in decided:
                raise InputError(
                    f"the entries {other['name']} and {entry['name']} are of the same model, defenses and images, and differ: "
                    "keep one of them"
                )
            name = found[its]["name"] if its in found else entry["name"]
            if owners.setdefault(name, its) != its:
                name = named_apart(name, its)
                owners[name] = its
            found[its] = {**entry, "name": name}
    return dict(sorted((entry["name"], entry) for entry in found.values()))
