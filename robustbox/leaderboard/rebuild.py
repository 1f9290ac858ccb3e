"""A run's defended model, built again from what the run says of itself; what it costs; and an entry held against its runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbox.boxes import ModuleBox, as_black_box
from robustbox.defense_file import is_file
from robustbox.distances import distance
from robustbox.errors import InputError
from robustbox.evaluator import clerk, share_reached, undefended
from robustbox.folder import read_run
from robustbox.goals import goal
from robustbox.inputs import resolve_defenses
from robustbox.leaderboard.sources import Run
from robustbox.oracle import Oracle
from robustbox.originals import originals_of
from robustbox.protocol import BlackBox, Defense

_ROUNDS, _BATCH = 9, 32


def rebuild(run: Run) -> tuple[BlackBox, BlackBox]:
    """The model of a run, alone and defended, on the CPU.

    Raises:
        InputError: it cannot be built from its name, or its weights are others.
    """
    d, name = run.document, run.config["model"]
    if not isinstance(name, str) or name.startswith(("http:", "https:")):
        raise InputError(f"model {name} cannot be built again here")
    box = as_black_box(name, "cpu")
    found, due = box.describe().get("weights_sha256"), d["model"].get("weights_sha256")
    if found != due:
        raise InputError(f"the weights of {name} are not those of the run: {found} instead of {due}")
    defended = box
    for recipe in reversed(_defenses(run)):
        defended = recipe.wrap(defended, d["seed"])
    return box, defended


def _defenses(run: Run) -> list[Defense]:
    """A run's defenses, outermost first: from the files that its config names, else by names and options."""
    named = run.config.get("defense") or []
    named = [named] if isinstance(named, str) else named
    if any(is_file(each) for each in named):
        chain = resolve_defenses(named, run.config.get("defense_options"))
        said = [recipe["options"] for recipe in run.document["defense"]]
        if [json.loads(json.dumps(recipe.options())) for recipe in chain] != said:
            raise InputError(f"{', '.join(filter(is_file, named))}: not the defense that the run had")
        return chain
    return [resolve_defenses(each["name"], each["options"])[0] for each in run.document["defense"]]


def cost(run: Run) -> dict[str, Any] | None:
    """What a query of a run's defended model costs, beside the bare model, interleaved; None where it is no module of ours.

    CPU time of single passes over the run's adversarials, or over its images where it found none, sent by an evaluator: a
    gate's history is empty. The least of the rounds: whatever else the machine does only adds to them.
    """
    try:
        bare, defended = rebuild(run)
    except InputError:
        return None
    rows = _rows(run)
    if not isinstance(bare, ModuleBox) or rows is None:
        return None
    rows = rows.repeat(-(-_BATCH // len(rows)), 1, 1, 1)[:_BATCH]
    seen = []
    hook = bare.module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    times: dict[str, list[float]] = {"bare": [], "defended": []}
    passes = 0
    for turn in range(_ROUNDS + 1):
        if turn > 3 and passes > 8 * len(rows):
            break  # a vote over many copies: slow, and steady enough by now
        for which, box in (("bare", bare), ("defended", defended)):
            seen.clear()
            accounts = torch.tensor([clerk("cost", turn, k) for k in range(len(rows))])
            start = time.process_time()
            box.answer(rows, accounts)
            if turn:  # the first round warms up
                times[which].append(time.process_time() - start)
            passes = sum(seen)
    hook.remove()
    least = {which: min(its) for which, its in times.items()}
    return {
        "passes_per_query": passes / len(rows),
        "time_ratio": round(least["defended"] / least["bare"], 2) if defended is not bare else 1.0,
        "milliseconds_per_query": round(1000 * least["defended"] / len(rows), 3),
        "device": run.document["environment"]["processor"],
    }


def _rows(run: Run) -> Tensor | None:
    """Rows [n,C,H,W] like those that a run asked: a defense that stood has no adversarials, only the images."""
    adversarials = read_run(run.path)[1]
    found = adversarials[~adversarials.flatten(1).isnan().any(dim=1)]
    return found if len(found) else originals_of(run.path)


def ask_again(run: Run) -> list[str]:
    """Ask a run's adversarials again on the rebuilt defended model; what differs from what the run says, in sentences.

    A gate is built with an empty history, so that its adversarials are judged alone: a success must fool it then.
    """
    document, adversarials = read_run(run.path)
    images = document["images"]
    wrong = _distances(run.path, images, adversarials, document["norm"])
    found = [i for i, image in enumerate(images) if image["distance"] is not None]
    if not found:
        return wrong
    bare, defended = rebuild(run)
    oracle = Oracle(defended, "label", document["levels"])
    goals = [goal(images[i]["label"], images[i]["target"]) for i in found]
    clerks = _clerks(document, found)
    fresh = share_reached(oracle, adversarials[found], goals, clerks, _BATCH) > 0.5
    alone = share_reached(undefended(oracle), adversarials[found], goals, clerks, _BATCH) > 0.5
    for i, held, plain in zip(found, fresh.tolist(), alone.tolist(), strict=True):
        if document["stateful"]:
            if images[i]["success"] and not held:
                wrong.append(f"image {i}: its adversarial does not fool the defended model")
        elif held != images[i]["success_fresh"]:
            wrong.append(f"image {i}: its adversarial {'fools' if held else 'does not fool'} the defended model")
        if bare is not defended and plain != images[i]["success_undefended"]:
            wrong.append(f"image {i}: its adversarial {'fools' if plain else 'does not fool'} the undefended model")
    return wrong


def _clerks(document: Mapping[str, Any], found: Sequence[int]) -> list[int]:
    """The evaluator's accounts of the run's verification: the noise of a stochastic box depends on them."""
    names = [image["sha256"] for image in document["images"]]
    return [clerk(document["seed"], names[i], "verify", names[:i].count(names[i])) for i in found]


def _distances(folder: Path, images: Sequence[Mapping[str, Any]], adversarials: Tensor, norm: str) -> list[str]:
    """Which adversarials are not where the run says; nothing where the images themselves are not to be had."""
    originals = originals_of(folder)
    if originals is None:
        return ["the attacked images are not to be had: their hashes and distances cannot be checked"]
    far = distance(adversarials - originals, norm).double().numpy()  # type: ignore[arg-type]
    far[adversarials.flatten(1).isnan().any(dim=1).numpy()] = np.nan  # none was found: l0 would count its pixels
    said = np.array([np.nan if image["distance"] is None else image["distance"] for image in images])
    off = ~np.isclose(far, said, rtol=1e-5, atol=1e-6, equal_nan=True)
    return [f"image {i}: its adversarial is at {far[i]:.6g}, not at {said[i]:.6g}" for i in np.flatnonzero(off)]
