"""Threat models: which runs may be held against each other, and what an attack broke under one within so many queries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from robustbox.leaderboard.sources import Run
from robustbox.records import inside
from robustbox.results import MILESTONES


class Threat(NamedTuple):
    """A norm and radius (None: any distance), a goal, the grey levels that rows are rounded to, and what the attacker sees."""

    norm: str
    epsilon: float | None
    targeted: bool
    levels: int | None
    knowledge: str


def threats_of(runs: Iterable[Run], radii: Mapping[str, Iterable[float]]) -> list[Threat]:
    """The threat models of some runs.

    A run that minimised the distance is scored at every radius of its norm that another run or `radii` names, and at any
    distance where there is none.
    """
    named: dict[str, set[float]] = {norm: set(values) for norm, values in radii.items()}
    runs = list(runs)
    for run in runs:
        if run.document["epsilon"] is not None:
            named.setdefault(run.document["norm"], set()).add(run.document["epsilon"])
    found = set()
    for run in runs:
        d = run.document
        scored: Iterable[float | None] = [d["epsilon"]] if d["epsilon"] is not None else named.get(d["norm"]) or [None]
        found |= {Threat(d["norm"], epsilon, d["targeted"], d["levels"], d["knowledge"]) for epsilon in scored}
    return sorted(found, key=lambda t: (t.norm, t.epsilon or 0, t.targeted, t.levels or 0, sees(t.knowledge)))


def counts_under(run: Run, threat: Threat) -> bool:
    """Whether a run tells something about a threat model: it kept to the rules, and needed to see no more."""
    d = run.document
    same = (d["norm"], d["targeted"], d["levels"]) == (threat.norm, threat.targeted, threat.levels)
    return same and d["epsilon"] in (None, threat.epsilon) and sees(d["knowledge"]) <= sees(threat.knowledge)


def sees(knowledge: str) -> float:
    """How much an attacker sees, as a number to compare: labels, then top-K by K, then scores, then logits."""
    if top := re.fullmatch(r"top-(\d+)", knowledge):
        return float(top[1])
    return {"label": 0.0, "score": math.inf, "logit": math.inf}[knowledge]


def budgets_of(runs: Iterable[Run]) -> list[int]:
    """The numbers of queries at which runs are read: the milestones below the largest budget, and each budget."""
    own = {int(run.document["budget"]) for run in runs}
    return sorted(own | {q for q in MILESTONES if 100 <= q < max(own)})


def distance_within(image: Mapping[str, Any], queries: int) -> float:
    """The least adversarial distance that an image's attack found within so many queries; inf for none."""
    return min((far for query, far in image["trace"] if query <= queries), default=math.inf)


def broken(run: Run, threat: Threat, queries: int) -> list[bool]:
    """Which images a run broke within so many queries and the threat model's ball.

    Where the black box answers at random only adversarials count that the evaluator confirmed on fresh draws.
    """
    chance = run.document["stochastic"]
    return [
        bool(image["clean_correct"])
        and inside(distance_within(image, queries), threat.epsilon)
        and (image["success_fresh"] or not chance)
        for image in run.document["images"]
    ]
