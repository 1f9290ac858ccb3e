"""Who stands where under a threat model: entries in order, and the numbers that a reader sorts by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def order(rows: Sequence[Mapping[str, Any]], queries: int) -> list[tuple[int | None, Mapping[str, Any]]]:
    """Rows (`entry`, `threat`) with their places at a number of queries, best first.

    What counts is the accuracy under the best known attack of each image; where any distance counts as broken, the median
    distance that it needs, no adversarial at all being farthest. Rows as good share a place. Those without the adaptive
    attack that they need have no place and stand after all that have one; those not measured at that number stand last.
    """

    def key(row: Mapping[str, Any]) -> tuple[int, float]:
        threat = row["threat"]
        accuracy = threat["robust_accuracy"].get(str(queries))
        if accuracy is None:
            return (2, 0.0)
        far = threat["median_distance"][str(queries)]["value"]
        if far is None:  # half of the images were not broken; or none was classified correctly
            far = float("inf") if accuracy["hits"] else 0.0
        good = accuracy["share"] if threat["epsilon"] is not None else far
        return (1 if threat["adaptive"]["missing"] else 0, -good)

    placed: list[tuple[int | None, Mapping[str, Any]]] = []
    ahead: tuple[int, tuple[int, float]] | None = None
    for k, row in enumerate(sorted(rows, key=lambda row: (*key(row), row["entry"]["name"]))):
        its = key(row)
        if its[0]:
            placed.append((None, row))
            continue
        place = ahead[0] if ahead is not None and ahead[1] == its else k + 1
        ahead = (place, its)
        placed.append((place, row))
    return placed


def strongest(threat: Mapping[str, Any]) -> Mapping[str, Any]:
    """The attack that left the fewest images, at its own budget."""

    def left(attack: Mapping[str, Any]) -> tuple[float, int, str]:
        last = attack["robust_accuracy"][str(attack["budget"])]
        return (last["share"] or 0.0, attack["budget"], attack["attack"]["name"])

    found: Mapping[str, Any] = min(threat["attacks"], key=left)
    return found


def shared_budget(threats: Sequence[Mapping[str, Any]]) -> int:
    """The largest number of queries at which every row was measured, else the largest of all."""
    sets: list[set[int]] = [set(threat["budgets"]) for threat in threats]
    return max(set.intersection(*sets) or set.union(*sets))
