"""Defended models: what the pre-flight is shown of them, and what audit.json says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robustbox import inputs
from robustbox.protocol import BlackBox
from robustbox.provenance import record_of
from robustbox.results import meets_gates, share_of

from .cells import Cell
from .flags import Flag, flag
from .plan import System, data_of, images_of
from .preflight import Subject
from .spec import AuditSpec
from .summary import Document
from .world import World


def subject_of(system: System, spec: AuditSpec, world: World) -> Subject:
    """A defended model as the pre-flight looks at it."""
    model, images, labels = images_of(system.model, spec, world)
    recipes = system.recipes()

    def build() -> BlackBox:
        box = model
        for recipe in reversed(recipes):
            box = recipe.wrap(box, spec.seed)
        return box

    other = spec.preflight.benign_data
    everything = world.everything(other or data_of(system.model))[0]
    benign = everything if other else everything[len(images) :]
    levels = model.levels if system.model.levels is None else system.model.levels
    return Subject(build, model, images, labels, benign if len(benign) else None, levels, spec.seed)


def benign_of(system: System, refused: Document) -> Document:
    """`benign/ID.json`: natural images that a defense refused."""
    return {
        "schema": 1,
        "model": system.model.model,
        "defense": record_of(system.recipes()),
        **refused,
        "confidence": 0.95,
    }


def system_summary(
    system: System,
    seen: Document,
    cells: Sequence[Cell],
    documents: Mapping[str, Document | None],
    certified: Document | None,
    radii: Sequence[float],
) -> Document:
    """`systems[]` of audit.json; `radii` are those at which thresholds ask for certified accuracy."""
    done = next((document for cell in cells if (document := documents[cell.id]) is not None), None)
    return {
        "id": system.id,
        "model": system.model.name,
        "defense": system.defense.name,
        "clean_accuracy": seen["clean"] if done is None else done["summary"]["clean_accuracy"],
        "benign": seen["benign"],
        "certified": None if certified is None else _certified(certified, radii),
        "preflight": {key: value for key, value in seen.items() if key not in ("flags", "benign")},
        "flags": [*seen["flags"], *(each.plain() for each in _flags(seen, cells))],
    }


def _certified(certified: Document, radii: Sequence[float]) -> Document:
    """Certified accuracy at the radii that the certificates are summed up at, and at others."""
    held = [image["radius"] if image["correct"] else -1.0 for image in certified["images"]]
    more = {f"{at:g}": share_of(sum(far >= at for far in held), len(held)) for at in radii}
    known: Document = more | certified["summary"]["certified_accuracy"]
    return dict(sorted(known.items(), key=lambda item: float(item[0])))


def sees(cell: Cell) -> str:
    """What a cell's attack is granted, or needs at least."""
    config = cell.config
    return config.knowledge or inputs.resolve_attack(config.attack, config.attack_options).knowledge


def _flags(seen: Document, cells: Sequence[Cell]) -> list[Flag]:
    """Flags that depend on the attacks that are run."""
    flags = []
    if seen["stochastic"] and not any(cell.config.eot > 1 for cell in cells):
        flags.append(flag("no-eot"))
    if seen["stateful"] and not any(meets_gates(cell.config.attack) for cell in cells):
        flags.append(flag("no-adaptive-attack"))
    if cells and (n := cells[0].config.images or 0) < 100:
        flags.append(flag("few-images", f"{n} images"))
    return flags
