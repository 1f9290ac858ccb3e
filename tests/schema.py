"""Holds JSON files against their documentation: results.json against docs/results.md, audit.json against docs/audit.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CHECKS = {
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "share": lambda value: value is None or isinstance(value, int | float),
    "any": lambda value: True,
}


def without_times(document: dict[str, Any]) -> dict[str, Any]:
    """What a results.json says of what was found: not when, how fast, in how many sessions, or in how much memory of a gate."""
    found = {
        key: value for key, value in document.items() if key not in ("written", "seconds", "rows_per_second", "journal")
    }
    for stage in found["pipeline"]:
        for name in ("milliseconds_per_query", "bytes_per_query"):
            stage.get("statistics", {}).pop(name, None)
    return found


def check_document(document: dict[str, Any], documentation: Path, least: int = 50) -> None:
    """Assert that every field is documented once, with its type, and that all of these (`least` or more) are there."""
    fields, leaves = documented(documentation), flatten(document)
    assert len(fields) >= least
    empty = [path for path, value in leaves if value == []]
    for path, value in leaves:
        if value == []:
            continue
        kinds = [kind for pattern, kind in fields if pattern.fullmatch(path)]
        assert len(kinds) == 1, f"{path} stands {len(kinds)} times in the documentation"
        assert any(CHECKS[kind](value) for kind in kinds[0].split(" or ")), f"{path} = {value!r} is no {kinds[0]}"
    for pattern, _ in fields:
        written = any(pattern.fullmatch(path) for path, _ in leaves)
        unseen = any(pattern.pattern.startswith(re.escape(path)) for path in empty)  # the elements of an empty list
        assert written or unseen, f"{pattern.pattern} is documented but not written"


def documented(documentation: Path) -> list[tuple[re.Pattern[str], str]]:
    """(pattern of a path, type) of every field in the documentation, from the heading of the file's schema on."""
    text = re.split(r"^## \w+\.json, schema \d+$", documentation.read_text(), maxsplit=1, flags=re.MULTILINE)[-1]
    rows = re.findall(r"^\| (`[^|]+`) \| ([\w ]+) \|", text, re.MULTILINE)
    paths = [(path, kind) for cell, kind in rows for path in re.findall(r"`([^`]+)`", cell)]
    return [(re.compile(re.escape(path).replace(r"\*", r"[^.\[\]]+")), kind) for path, kind in paths]


def flatten(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every leaf of a JSON value with its path; an empty list is one."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in flatten(item, f"{path}.{key}" if path else key)]
    if isinstance(value, list) and not value:
        return [(f"{path}[]", value)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in flatten(item, f"{path}[]")]
    return [(path, value)]
