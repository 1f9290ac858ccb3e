"""Entries: a defended model on one set of images, and everything that was measured of it, as small JSON files.

docs/leaderboard-entries.md is their schema. The same runs make the same entries, byte for byte; only `cost` is a
measurement of the machine, which is kept while what it measured stays the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robustbox.leaderboard.sources import KIND, Run, Sources
from robustbox.leaderboard.threats import Threat, broken, budgets_of, counts_under, distance_within, threats_of
from robustbox.results import meets_gates, noticed, share_of
from robustbox.statistics import median_interval

SCHEMA = 1
ABOUT = {"authors": None, "paper": None, "note": None}
"""What people write into an entry by hand; kept when it is made again."""


def build(sources: Sources, radii: Mapping[str, Iterable[float]] | None = None) -> dict[str, dict[str, Any]]:
    """The entries that some sources make, by name, without those that were made before.

    Args:
        sources: what was found on disk.
        radii: radii, by norm, at which minimising runs are scored beside those that other runs name.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in sources.runs:
        groups.setdefault(_identity(run), []).append(run)
    threats = threats_of(sources.runs, radii or {})
    names = Counter(_name(runs[0]) for runs in groups.values())
    entries = {}
    for identity, runs in sorted(groups.items()):
        name = _name(runs[0])
        if names[name] > 1:
            name = named_apart(name, identity)
        entries[name] = _entry(name, runs, threats, sources)
    return entries


def named_apart(name: str, identity: Sequence[str]) -> str:
    """The name of an entry where another one, about something else, has the same."""
    return f"{name}-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:8]}"


def defense_key(defense: Sequence[Mapping[str, Any]]) -> str:
    """A defense chain as one comparable string."""
    return json.dumps([[recipe["name"], recipe["options"]] for recipe in defense], sort_keys=True)


def _identity(run: Run) -> tuple[str, ...]:
    model = run.document["model"]
    return (model["name"], str(model.get("weights_sha256")), defense_key(run.document["defense"]), _images_sha256(run))


def _images_sha256(run: Run) -> str:
    """The hash of the attacked images and their labels, whatever their order."""
    lines = sorted(f"{image['sha256']} {image['label']}" for image in run.document["images"])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _name(run: Run) -> str:
    words = [run.document["model"]["name"], *(recipe["name"] for recipe in reversed(run.document["defense"]))]
    return "+".join(re.sub(r"[^\w.-]+", "-", word).strip("-.") for word in words)


def _entry(name: str, runs: Sequence[Run], threats: Sequence[Threat], sources: Sources) -> dict[str, Any]:
    first = runs[0].document
    of_threat = [(threat, [run for run in runs if counts_under(run, threat)]) for threat in threats]
    own = [(t, its) for t, its in of_threat if any(run.document["knowledge"] == t.knowledge for run in its)]
    clean = clean_images(runs)
    radii = sorted({t.epsilon for t, _ in own if t.norm == "l2" and t.epsilon is not None})
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "name": name,
        "about": dict(ABOUT),
        "model": {key: first["model"].get(key) for key in ("name", "weights_sha256", "parameters")},
        "defense": [{"name": recipe["name"], "options": recipe["options"]} for recipe in first["defense"]],
        "stochastic": any(run.document["stochastic"] for run in runs),
        "stateful": any(run.document["stateful"] for run in runs),
        "images": {"count": len(first["images"]), "sha256": _images_sha256(runs[0])},
        "clean_accuracy": share_of(sum(clean.values()), len(clean)),
        "false_positives": _false_positives(runs[0], sources),
        "certified": _certified(first, radii, sources),
        "cost": None,
        "threats": [_threat(threat, its, clean) for threat, its in own],
    }


def clean_images(runs: Sequence[Run]) -> dict[str, bool]:
    """Which images, by hash and turn, were classified correctly before every run."""
    clean: dict[str, bool] = {}
    for run in runs:
        for key, image in _by_hash(run).items():
            clean[key] = clean.get(key, True) and image["clean_correct"]
    return clean


def _by_hash(run: Run) -> dict[str, Mapping[str, Any]]:
    """A run's images by hash; one that comes twice has two keys."""
    nth: Counter[str] = Counter()
    found = {}
    for image in run.document["images"]:
        found[f"{image['sha256']}/{nth[image['sha256']]}"] = image
        nth[image["sha256"]] += 1
    return found


def _threat(threat: Threat, runs: Sequence[Run], clean: Mapping[str, bool]) -> dict[str, Any]:
    budgets = budgets_of(runs)
    needs = [need for need, has in (("eot", _eot(runs)), ("oars", _oars(runs))) if has is not None]
    missing = [need for need, has in (("eot", _eot(runs)), ("oars", _oars(runs))) if has is False]
    attacks = [_attack(run, threat) for run in runs]
    attacks.sort(key=lambda a: (a["attack"]["name"], a["eot"], json.dumps(a, sort_keys=True)))
    standing = [_survivors(runs, threat, clean, q) for q in budgets]
    return {
        **threat._asdict(),
        "budgets": budgets,
        "adaptive": {"needs": needs, "missing": missing},
        "robust_accuracy": {str(q): share_of(s, len(clean)) for q, s in zip(budgets, standing, strict=True)},
        "median_distance": {str(q): _median(runs, clean, q) for q in budgets},
        "attacks": attacks,
    }


def _eot(runs: Sequence[Run]) -> bool | None:
    """Whether some run asked its rows several times, where that is needed to be adaptive; else None."""
    return any(r.document["eot"] > 1 for r in runs) if any(r.document["stochastic"] for r in runs) else None


def _oars(runs: Sequence[Run]) -> bool | None:
    """Whether some run's attack adapts to gates, where that is needed to be adaptive; else None."""
    named = any(meets_gates(run.document["attack"]["name"]) for run in runs)
    return named if any(run.document["stateful"] for run in runs) else None


def _survivors(runs: Sequence[Run], threat: Threat, clean: Mapping[str, bool], queries: int) -> int:
    """Images classified correctly that no run broke: the accuracy under the best known attack of each image."""
    fell = set()
    for run in runs:
        fell |= {key for key, it in zip(_by_hash(run), broken(run, threat, queries), strict=True) if it}
    return sum(right and key not in fell for key, right in clean.items())


def _median(runs: Sequence[Run], clean: Mapping[str, bool], queries: int) -> dict[str, Any]:
    """The median over images of the least distance that any run found, with its interval; infinity is null."""
    least = {key: math.inf for key, right in clean.items() if right}
    for run in runs:
        for key, image in _by_hash(run).items():
            if key in least:
                least[key] = min(least[key], distance_within(image, queries))
    estimate = median_interval(list(least.values()))._asdict()
    return {name: value if math.isfinite(value) else None for name, value in estimate.items()}


def _attack(run: Run, threat: Threat) -> dict[str, Any]:
    """What one run did under a threat model."""
    d = run.document
    images = d["images"]
    tried = [image for image in images if image["clean_correct"]]
    accuracy = {}
    for q in budgets_of([run]):
        fell = broken(run, threat, q)
        accuracy[str(q)] = share_of(
            sum(i["clean_correct"] and not b for i, b in zip(images, fell, strict=True)), len(images)
        )
    same = ("knowledge", "epsilon", "eot", "accounts", "budget", "total_budget", "seed")
    return {
        "attack": {"name": d["attack"]["name"], "options": d["attack"]["options"]},
        **{name: d[name] for name in same},
        "robust_accuracy": accuracy,
        "detected": share_of(sum(map(noticed, tried)), len(tried)) if d["stateful"] else None,
        "rejected": sum(image["rejected"] for image in images),
        "queries": sum(image["queries"] for image in images),
        "accounts_burnt": sum(image["accounts_burnt"] for image in images) if d["stateful"] else None,
        "errors": sum(image["error"] is not None for image in images),
        "run": {"folder": run.name, **run.hashes()},
        "config": run.config,
    }


def _false_positives(run: Run, sources: Sources) -> dict[str, Any] | None:
    """Rows that nobody attacked and the gate refused all the same, with the Clopper-Pearson interval that the audit took."""
    for found in sources.benign:
        model = found["model"]["name"] if isinstance(found["model"], dict) else found["model"]
        same = defense_key(found["defense"]) == defense_key(run.document["defense"])
        if same and model in (run.document["model"]["name"], run.config["model"]):
            hits, of = found["refused"], found["of"]
            return {
                "hits": hits,
                "of": of,
                "share": hits / of if of else None,
                "low": found["low"],
                "high": found["high"],
            }
    return None


def _smooths(certificate: Mapping[str, Any], defense: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a certificate is one of this chain: it holds for the smoothed classifier, never for the one that is smoothed."""
    if not defense or defense[0]["name"] != "smoothing":
        return False
    noise = defense[0]["options"]
    same = (noise["sigma"], noise["clip"]) == (certificate["sigma"], certificate["clip"])
    return same and defense_key(defense[1:]) == defense_key(certificate["defense"])


def _certified(document: Mapping[str, Any], radii: Sequence[float], sources: Sources) -> dict[str, Any] | None:
    """Certified accuracy at the certificate's own radii and at those of the threat models, from image to image."""
    for found, digest in sources.certificates:
        model, own = found["model"], document["model"]
        same = model["name"] == own["name"] and model.get("weights_sha256") == own.get("weights_sha256")
        same &= found.get("levels") == own.get("levels")  # noisy rows are rounded as they are where it is deployed
        if same and _smooths(found, document["defense"]):
            images = found["images"]
            held = [image["radius"] if image["correct"] else -1.0 for image in images]
            points = sorted({float(r) for r in found["summary"]["certified_accuracy"]} | set(radii))
            accuracy = [share_of(sum(far >= r for far in held), len(images)) for r in points]
            proven = [{"radius": r, "accuracy": its} for r, its in zip(points, accuracy, strict=True)]
            same_images = {"norm": found["norm"], "sigma": found["sigma"], "n": found["n"], "alpha": found["alpha"]}
            return {**same_images, "radii": proven, "certified_sha256": digest}
    return None
