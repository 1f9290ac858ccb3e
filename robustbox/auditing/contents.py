"""What the names of an audit stood for when something was asked: an answer is not taken for one about something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from robustbox.folder import finite
from robustbox.identity import sha256
from robustbox.protocol import Defense
from robustbox.provenance import record_of

from .plan import System, images_of
from .spec import AuditSpec
from .summary import Document
from .world import World


class Contents:
    """What an audit is about, by content: weights, options of defenses with the hashes of their files, images, labels.

    Args:
        spec: the audit.
        world: what its names stand for.
    """

    def __init__(self, spec: AuditSpec, world: World) -> None:
        self._spec, self._world = spec, world
        self._known: dict[str, list[tuple[str, int]]] = {}

    def changed(self, system: System, recipes: Sequence[Defense], document: Document) -> str | None:
        """What is other than it was when a cell was run or certificates were made, in words; None where nothing is.

        Args:
            recipes: what stands around the model there, outermost first.
        """
        weights = document["model"].get("weights_sha256"), self._weights(system)
        if None not in weights and weights[0] != weights[1]:
            return f"{system.model.name} has other weights"
        if not _fits(document["defense"], finite(record_of(recipes))):
            return f"{system.defense.name} has other options or another file"
        if [(image["sha256"], image["label"]) for image in document["images"]] != self._images(system):
            return f"{system.model.name} is attacked on other images or labels"
        return None

    def digest(self, system: System, *more: object) -> str:
        """Eight digits that change with whatever is asked of a defended model; `more` are plain JSON values."""
        what = [self._weights(system), record_of(system.recipes()), self._images(system), self._spec.seed, *more]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]

    def _weights(self, system: System) -> Any:
        return self._world.box(system.model.model, self._spec.device).describe().get("weights_sha256")

    def _images(self, system: System) -> list[tuple[str, int]]:
        """The hash and the label of each image, taken once for each model."""
        name = system.model.name
        if name not in self._known:
            _, images, labels = images_of(system.model, self._spec, self._world)
            self._known[name] = [*zip(map(sha256, images), labels.tolist(), strict=True)]
        return self._known[name]


def _fits(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> bool:
    """Whether defenses are the same; an option that one version knows and the other does not tells nothing."""
    if [each["name"] for each in then] != [each["name"] for each in now]:
        return False
    pairs = [(old["options"], new["options"]) for old, new in zip(then, now, strict=True)]
    return all(old[key] == new[key] for old, new in pairs for key in old.keys() & new.keys())
