"""What a contest was: the rules that it kept to, and what its results, its configuration and its journal say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from torch import Tensor

from robustbox.environment import environment
from robustbox.evaluator import undefended
from robustbox.identity import sha256
from robustbox.journaled import digest
from robustbox.oracle import Oracle
from robustbox.protocol import Attack, BlackBox, Defense, Norm

_ASKED = ("norm", "epsilon", "budget", "total_budget", "knowledge", "levels", "seed", "keep_going", "eot", "accounts")
_CHANCE = ("pipeline", "stochastic", "stateful", "max_rows", "seconds", "rows_per_second", "journal", "environment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The threat model of a contest, checked: what `run_attack` was asked for."""

    norm: Norm
    epsilon: float | None
    budget: int
    total_budget: int | None
    keep_going: bool
    max_rows: int | Literal["auto"]
    seed: int
    eot: int
    accounts: int | None


def meta_of(
    oracle: Oracle,
    attack: Attack,
    defenses: Sequence[Defense],
    rules: Rules,
    images: Sequence[Mapping[str, Any]],
    starts: int,
    max_rows: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What was run on what, by whom and with which versions: plain JSON values.

    Args:
        oracle: what was asked.
        attack: who asked.
        defenses: what stands around the model, outermost first.
        rules: the threat model.
        images: of each image its hash, label and target.
        starts: how many of them were given a row to begin from.
        max_rows: rows a pass, as it came out.
        seconds: how long each phase took.
    """
    meta: dict[str, Any] = {
        "model": undefended(oracle).box.describe(),
        "defense": record_of(defenses),
        "pipeline": pipeline_of(oracle.box),
        "attack": {"name": attack.name, "options": attack.options()},
        "norm": rules.norm,
        "epsilon": rules.epsilon,
        "targeted": images[0]["target"] is not None,
        "budget": rules.budget,
        "total_budget": rules.total_budget,
        "knowledge": oracle.knowledge,
        "levels": oracle.levels,
        "keep_going": rules.keep_going,
        "starts": starts,
        "eot": rules.eot,
        "accounts": rules.accounts,
        "seed": rules.seed,
        "stochastic": oracle.box.stochastic,
        "stateful": oracle.box.stateful,
        "max_rows": max_rows,
        "seconds": seconds,
        "rows_per_second": oracle.charged / seconds["attack"] if seconds["attack"] else None,
        "journal": {"sessions": 1, "in_flight": 0} if oracle.journal is None else oracle.journal.summary(),
        "environment": environment(oracle.box.device),
        "images": images,
    }
    return {key: plain(value) for key, value in meta.items()}


def record_of(defenses: Sequence[Defense]) -> list[dict[str, Any]]:
    """Defenses, outermost first, as results name them: plain JSON values."""
    return [{"name": recipe.name, "options": plain(recipe.options())} for recipe in defenses]


def pipeline_of(box: BlackBox) -> list[dict[str, object]]:
    """What each defense says of itself as it stands around the model, outermost first; nothing of the model."""
    stages = []
    while box.inner is not None:
        stages.append({key: value for key, value in box.describe().items() if key != "inner"})
        box = box.inner
    return stages


def config_of(meta: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """A contest under the names of the command line's options, as far as names can tell."""
    defenses = [recipe["name"] for recipe in meta["defense"]]
    return {
        "model": meta["model"]["name"],
        "images": len(meta["images"]),
        "attack": meta["attack"]["name"],
        "attack_options": meta["attack"]["options"],
        "targets": [image["target"] for image in meta["images"]] if meta["targeted"] else None,
        "defense": defenses or None,
        **({"defense_options": meta["defense"][0]["options"]} if len(defenses) == 1 else {}),
        **{name: meta[name] for name in _ASKED},
        "device": meta["environment"]["device"],
        "max_rows": rules.max_rows,
    }


def identity_of(
    meta: Mapping[str, Any], rules: Rules, pool: tuple[Tensor, Tensor] | None, starts: Sequence[Tensor | None]
) -> dict[str, Any]:
    """What the queries of a contest depend on: runs that differ in it are different runs."""
    model = {key: value for key, value in meta["model"].items() if key not in ("traffic", "batch", "concurrency")}
    return {
        **{key: value for key, value in meta.items() if key not in _CHANCE},
        "model": model,
        "max_rows": rules.max_rows,
        "device": meta["environment"]["device"].partition(":")[0],
        "pool": None if pool is None else digest(*pool).hex(),
        "starts": [None if row is None else sha256(row) for row in starts] if meta["starts"] else None,
    }


def plain(value: Any) -> Any:
    """A value as JSON can hold it; what it cannot hold is named."""
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return str(value)  # plain, also of torch's own kind of string
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return getattr(value, "__qualname__", type(value).__qualname__)
