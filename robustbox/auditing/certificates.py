"""Certificates in an audit: smoothed models, certified image by image, in folders of `python -m robustbox.certify`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbox.certify import CertifyConfig
from robustbox.certify import run as certify
from robustbox.claim import CERTIFIED, asked
from robustbox.errors import InputError, ModelError
from robustbox.inputs import resolve_defenses
from robustbox.oracle import Oracle
from robustbox.protocol import Defense

from .plan import System, data_of
from .preflight import Subject
from .spec import AuditSpec, CertifyEntry, matches
from .world import World


@dataclass(frozen=True)
class Certification:
    """One defended model to certify: where it is written, and how. It goes on where it was stopped."""

    system: System
    config: CertifyConfig

    @property
    def rows(self) -> int:
        """Rows on the `certify` ledger at most."""
        return (self.config.images or 0) * (self.config.n0 + self.config.n)

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.config.out or "")

    def recipes(self) -> list[Defense]:
        """What stands around the model, outermost first: a part of what is smoothed."""
        return resolve_defenses(self.config.defense, None)

    def document(self) -> dict[str, Any] | None:
        """What `certified.json` holds; None where it is not done."""
        path = self.folder / CERTIFIED
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def ledger(self) -> dict[str, int]:
        """Rows by ledger that it asked so far, done or not."""
        done = self.document()
        return {"certify": asked(self.folder)} if done is None else dict(done["summary"]["ledger"])

    def run(self) -> str | None:
        """Certify; what goes wrong is returned, as one that fails is not the end of the audit."""
        try:
            certify(self.config)
        except (InputError, ModelError) as error:
            return " ".join(str(error).split())
        return None


def certifications(
    spec: AuditSpec, systems: list[System], subject_of: Callable[[System], Subject], world: World, out: Path
) -> Iterator[Certification]:
    """What the audit's `certify` entries ask for; `subject_of` gives a system as the pre-flight looks at it.

    Raises:
        InputError: two entries for one defended model, a model that has no registered name, options of a defense, or what no
            certificate holds for (`Certifier.check`).
    """
    for system in systems:
        names = (system.model.name, system.defense.name)
        entries = [each for each in spec.certify if all(map(matches, names, (each.models, each.defenses)))]
        if not entries:
            continue
        if len(entries) > 1:
            raise InputError(f"{system.id} is to be certified twice: one entry of `certify` for each defended model")
        if system.model.model in world.models:
            raise InputError(f"{system.id} cannot be certified: it takes a registered model")
        entry, subject = entries[0], subject_of(system)
        config: dict[str, Any] = {
            "model": system.model.model,
            "data": data_of(system.model),
            "images": len(subject.images),
            **_smoothed(system, entry),
            "n0": entry.n0,
            "n": entry.n,
            "alpha": entry.alpha,
            "radii": entry.radii,
            "levels": system.model.levels,
            "seed": spec.seed,
            "device": spec.device,
        }
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        folder = str(out / "certified" / f"{system.id}.{digest}")
        found = Certification(system, CertifyConfig(**config, out=folder, quiet=True))
        _check(found, subject)
        yield found


def _check(found: Certification, subject: Subject) -> None:
    """Refuse what cannot be certified, before the audit asks a row.

    A defense that cannot be put on its model is that system's failure, as the pre-flight says.
    """
    try:
        box = subject.build()
    except InputError:
        return
    try:
        found.config.certifier().check(Oracle(box, levels=found.config.levels))
    except InputError as error:
        raise InputError(f"{found.system.id} cannot be certified: {error}") from None


def _smoothed(system: System, entry: CertifyEntry) -> dict[str, Any]:
    """What is smoothed, and how: a system behind `smoothing` is certified as it is, any other one as it would be behind it."""
    chain = system.defense.defense or []
    chain = [chain] if isinstance(chain, str) else chain
    if chain[:1] == ["smoothing"]:
        noise = system.recipes()[0].options()
        if entry.sigma not in (None, noise["sigma"]):
            raise InputError(
                f"{system.id} smooths with sigma {noise['sigma']}: leave sigma out of its entry of `certify`"
            )
        return {"defense": chain[1:] or None, "sigma": noise["sigma"], "clip": noise["clip"]}
    if entry.sigma is None:
        raise InputError(f"{system.id} is not smoothed: its entry of `certify` must say by which sigma")
    if system.defense.options:
        raise InputError(f"{system.id} cannot be certified: it takes a defense without options")
    return {"defense": system.defense.defense, "sigma": entry.sigma}
