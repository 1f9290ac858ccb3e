"""Thresholds: whether what an audit found holds what its file demands. What was not measured does not hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .cells import Cell
from .spec import Threshold, matches
from .summary import Document, row_summary

_OF_SYSTEMS = ("clean-accuracy", "false-positives", "certified-accuracy")
"""The metrics of defended models; the others are of cells or rows."""
Measured = tuple[str, float | None, float | None, float | None]
"""Where, the value, and its interval from low to high; None where it was not measured."""


def verdicts(
    thresholds: Sequence[Threshold],
    cells: Sequence[Cell],
    documents: dict[str, Document | None],
    summaries: dict[str, Document],
    systems: Sequence[Document],
    excluded: Sequence[Cell] = (),
) -> list[Document]:
    """Every threshold wherever it applies (`verdicts[]` of audit.json); `excluded` are the cells that cannot be run."""
    found = []
    for threshold in thresholds:
        places = list(_measured(threshold, cells, documents, summaries, systems))
        places += [] if threshold.metric in _OF_SYSTEMS else _unmet(threshold, cells, excluded)
        for place, value, low, high in places or [("nowhere: no cell of this audit matches", None, None, None)]:
            worse = value if not threshold.confident else low if threshold.min is not None else high
            found.append(
                {
                    "threshold": threshold.name,
                    "metric": threshold.metric,
                    "where": place,
                    "min": threshold.min,
                    "max": threshold.max,
                    "confident": threshold.confident,
                    "measured": value is not None and not math.isnan(value),
                    "value": value,
                    "low": low,
                    "high": high,
                    "holds": _holds(threshold, worse),
                }
            )
    return found


def _holds(threshold: Threshold, value: float | None) -> bool:
    if value is None or math.isnan(value):
        return False
    return value >= threshold.min if threshold.min is not None else value <= (threshold.max or 0.0)


def _measured(
    threshold: Threshold,
    cells: Sequence[Cell],
    documents: dict[str, Document | None],
    summaries: dict[str, Document],
    systems: Sequence[Document],
) -> Iterator[Measured]:
    if threshold.metric in _OF_SYSTEMS:
        yield from _of_systems(threshold, cells, summaries, systems)
        return
    chosen = [cell for cell in cells if _applies(threshold, cell)]
    if threshold.metric in ("robust-accuracy", "detection-misses"):
        for its in rows_of(chosen):
            row = row_summary(its, [documents[cell.id] for cell in its])
            place = f"{row['model']}, {row['defense']}, {row['threat']}, {row['budget']} queries"
            key = threshold.metric.replace("-", "_")
            if key == "detection_misses" and row["complete"] and row[key] is None:
                continue  # nothing here could detect anything
            yield place, *_share(row[key] if row["complete"] else None)
        return
    for cell in chosen:
        figures = summaries[cell.id]
        place = f"{cell.model}, {cell.defense}, {cell.attack}, {cell.threat}, {cell.budget} queries"
        if threshold.metric == "success":
            yield place, *_share(figures["success"])
        elif threshold.metric == "accounts-burnt":
            count = figures["accounts_burnt"]
            yield place, count, count, count
        else:
            found = figures[threshold.metric.replace("-", "_")] or dict.fromkeys(("value", "low", "high"))
            yield place, found["value"], found["low"], found["high"]


def _of_systems(
    threshold: Threshold, cells: Sequence[Cell], summaries: dict[str, Document], systems: Sequence[Document]
) -> Iterator[Measured]:
    for system in systems:
        if not (matches(system["model"], threshold.models) and matches(system["defense"], threshold.defenses)):
            continue
        place = f"{system['model']}, {system['defense']}"
        if threshold.metric == "false-positives":
            benign, seen = system["benign"], system["preflight"]
            if benign is not None:
                yield place, benign["refused"] / benign["of"], benign["low"], benign["high"]
            elif seen["error"] is not None or seen["stateful"]:
                yield place, None, None, None
        elif threshold.metric == "certified-accuracy":
            found = (system["certified"] or {}).get(f"{threshold.radius:g}")
            yield f"{place}, radius {threshold.radius:g}", *_share(found)
        else:
            yield place, *_share(system["clean_accuracy"])


def _unmet(threshold: Threshold, cells: Sequence[Cell], excluded: Sequence[Cell]) -> Iterator[Measured]:
    """The defended models on which attacks would match, had they been possible, and none is run."""
    met = {(cell.model, cell.defense) for cell in cells if _applies(threshold, cell)}
    due = dict.fromkeys((cell.model, cell.defense) for cell in excluded if _applies(threshold, cell))
    for model, defense in due:
        if (model, defense) not in met:
            yield f"{model}, {defense}: no attack could be run", None, None, None


def rows_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each model, defense, threat model and budget together, in order."""
    rows: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.model, cell.defense, cell.threat, cell.budget), []).append(cell)
    return list(rows.values())


def _applies(threshold: Threshold, cell: Cell) -> bool:
    kinds = (("model", "models"), ("defense", "defenses"), ("attack", "attacks"), ("threat", "threats"))
    fits = all(matches(getattr(cell, one), getattr(threshold, many)) for one, many in kinds)
    return fits and (threshold.budgets is None or cell.budget in threshold.budgets)


def _share(found: Document | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if found is None else (found["share"], found["low"], found["high"])
