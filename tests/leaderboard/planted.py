"""Runs planted by hand: what each image's attack found is written down, not searched for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

BLACKLIGHT = [{"name": "blacklight", "options": {"threshold": 25}}]
NOISE = [{"name": "input-noise", "options": {"sigma": 0.05}}]


def plant(
    folder: Path,
    traces: list[list[tuple[int, float]] | None],
    attack: str = "cgba",
    defense: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Path:
    """A run's folder.

    Args:
        folder: where to.
        traces: for each image its improvements (query, distance), or None where it was misclassified before.
        attack: the attack's name.
        defense: the chain of defenses.
        changes: fields of results.json that are not as usual; `refused`: queries refused, an image each.
    """
    refused = changes.pop("refused", [0] * len(traces))
    budget = changes.get("budget", 500)
    document: dict[str, Any] = {
        "schema": 1,
        "model": {"name": "planted", "weights_sha256": "ab" * 32, "parameters": 7},
        "defense": defense or [],
        "attack": {"name": attack, "options": {"n0": 30}},
        "norm": "l2",
        "epsilon": 1.0,
        "targeted": False,
        "budget": budget,
        "total_budget": None,
        "knowledge": "label",
        "levels": None,
        "eot": 1,
        "accounts": None,
        "seed": 0,
        "stochastic": False,
        "stateful": False,
        "environment": {"processor": "none"},
        **changes,
    }
    document["images"] = [
        {
            "index": i,
            "sha256": f"{i:064x}",
            "label": i,
            "target": None,
            "clean_correct": trace is not None,
            "success_fresh": bool(trace),
            "distance": trace[-1][1] if trace else None,
            "queries": 0 if trace is None else budget,
            "rejected": refused[i],
            "accounts_burnt": 1 if refused[i] else 0,
            "stop_reason": "misclassified" if trace is None else "budget",
            "error": None,
            "trace": trace or [],
        }
        for i, trace in enumerate(traces)
    ]
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": "planted", "attack": attack}))
    save_file({"adversarials": torch.zeros(len(traces), 1, 2, 2)}, folder / "adversarials.safetensors")
    return folder
