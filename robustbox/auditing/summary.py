"""What came of an audit: cells one by one, and rows, in which a defended model meets all attacks of one threat model.

An image of a row is broken if any of the row's attacks broke it: robust accuracy is that under the best attack known for each
image, not for all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from robustbox.comparisons import mcnemar, sign_test
from robustbox.results import MILESTONES, meets_gates, noticed, share_of
from robustbox.statistics import Estimate, median_interval
from robustbox.survival import followed, median_curve, median_queries, success_curve

from .cells import Cell

Document = dict[str, Any]


def cell_summary(cell: Cell, document: Document | None, error: str | None) -> Document:
    """A cell of audit.json. Figures are None where there are no results."""
    config = cell.config
    facts = {
        "id": cell.id,
        **cell.where(),
        "status": "done" if document is not None else "not-run" if error is None else "failed",
        "error": error,
        "folder": f"cells/{cell.id}",
        "norm": config.norm,
        "epsilon": config.epsilon,
        "targeted": config.targets is not None,
        "eot": config.eot,
        "knowledge": None if document is None else document["knowledge"],
    }
    return facts | (_figures(document, config.budget) if document is not None else dict.fromkeys(_FIGURES))


_FIGURES = [
    *("stochastic", "stateful", "clean_accuracy", "robust_accuracy", "success", "undetected"),
    *("median_distance", "median_queries", "success_at", "median_distance_at", "queries", "rejected", "accounts_burnt"),
    *("attack_errors", "unconfirmed", "rows", "seconds"),
]


def _figures(document: Document, budget: int) -> Document:
    summary = document["summary"]
    attacked = [image for image in document["images"] if image["clean_correct"]]
    won = [image["success"] for image in attacked]
    first = np.where(won, [image["first_success"] for image in attacked], 0)
    points = [q for q in MILESTONES if q < budget] + [budget]
    reasons = [image["stop_reason"] for image in attacked]
    success = success_curve(first, followed(reasons, [image["queries"] for image in attacked], budget))
    distances = [[_nearest(image, q) for image in attacked] for q in points]
    medians = median_curve(distances, points)
    unseen = sum(not noticed(image) for image in attacked)
    return {
        "stochastic": document["stochastic"],
        "stateful": document["stateful"],
        "clean_accuracy": summary["clean_accuracy"],
        "robust_accuracy": summary["robust_accuracy"],
        "success": summary["success"],
        "undetected": share_of(unseen, len(attacked)),
        "median_distance": estimate(median_interval(distances[-1])),
        "median_queries": estimate(median_queries(success)),
        "success_at": {str(q): estimate(success.at(q)) for q in points},
        "median_distance_at": {str(q): estimate(medians.at(q)) for q in points},
        "queries": summary["queries"],
        "rejected": summary["rejected"],
        "accounts_burnt": summary["accounts_burnt"],
        "attack_errors": summary["errors"],
        "unconfirmed": summary["unconfirmed"],
        "rows": summary["ledger"],
        "seconds": sum(document["seconds"].values()),
    }


def row_summary(cells: Sequence[Cell], documents: Sequence[Document | None]) -> Document:
    """A row of audit.json: all attacks of one threat model and budget on one defended model.

    `robust_accuracy` is None where no attack has results; where some have none, `complete` is False and it is an upper bound.
    """
    there = [(cell, document) for cell, document in zip(cells, documents, strict=True) if document is not None]
    place = {name: getattr(cells[0], name) for name in ("model", "defense", "threat", "budget")}
    row: Document = {**place, "complete": len(there) == len(cells), "attacks": [cell.attack for cell in cells]}
    row |= {"clean_accuracy": None, "robust_accuracy": None, "best_attack": None, "detection_misses": None}
    if not there:
        return row | {"adaptive": None, "pairs": []}
    intact = np.array([images_intact(document) for _, document in there])
    right = np.array([image["clean_correct"] for image in there[0][1]["images"]])
    best = int(intact.sum(axis=1).argmin())
    stateful = any(document["stateful"] for _, document in there)
    missed = np.array([[image["success"] and not noticed(image) for image in doc["images"]] for _, doc in there])
    return row | {
        "clean_accuracy": share_of(int(right.sum()), len(right)),
        "robust_accuracy": share_of(int(intact.all(axis=0).sum()), intact.shape[1]),
        "best_attack": there[best][0].attack if (right & ~intact[best]).any() else None,
        "detection_misses": share_of(int(missed.any(axis=0).sum()), int(right.sum())) if stateful else None,
        "adaptive": _adaptive(there),
        "pairs": [_pair(one, two) for one, two in combinations(there, 2)],
    }


def images_intact(document: Document) -> list[bool]:
    """Which images are classified correctly and were not broken."""
    return [image["clean_correct"] and not image["success"] for image in document["images"]]


def _adaptive(there: Sequence[tuple[Cell, Document]]) -> bool:
    """Whether some attack adapts to the defense: by EOT where it answers at random, by a wrapper where it remembers."""
    stochastic, stateful = (any(doc[what] for _, doc in there) for what in ("stochastic", "stateful"))
    eot = any(cell.config.eot > 1 for cell, _ in there)
    named = any(meets_gates(cell.config.attack) for cell, _ in there)
    return (eot or not stochastic) and (named or not stateful)


def _pair(one: tuple[Cell, Document], two: tuple[Cell, Document]) -> Document:
    """Two attacks on the same images: by success within the ball, or by distance where it was minimised."""
    (first, a), (second, b) = one, two
    both = [(x, y) for x, y in zip(a["images"], b["images"], strict=True) if x["clean_correct"] and y["clean_correct"]]
    if first.config.epsilon is None:
        test, far = "sign", [[_farthest(x["distance"]) for x in pair] for pair in both]
        found = sign_test([x for x, _ in far], [y for _, y in far])
    else:
        test, found = "mcnemar", mcnemar([x["success"] for x, _ in both], [y["success"] for _, y in both])
    better = {"first_better": found.first, "second_better": found.second, "ties": found.ties, "p": found.p}
    return {"first": first.attack, "second": second.attack, "test": test, **better}


def _farthest(distance: float | None) -> float:
    return np.inf if distance is None else distance


def _nearest(image: Document, queries: int) -> float:
    """The least distance within so many queries; inf for none, and for a success that was not confirmed."""
    if not image["success"]:
        return np.inf
    return min((far for query, far in image["trace"] if query <= queries), default=np.inf)


def estimate(found: Estimate) -> Document:
    """An estimate and its interval."""
    return {"value": found.value, "low": found.low, "high": found.high}
