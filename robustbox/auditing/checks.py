"""Whether the values of an audit's entries mean anything, whatever they are combined with: a typo leaves no cell out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from robustbox.errors import InputError
from robustbox.inputs import check_count, check_threat
from robustbox.oracle import check_knowledge_name

from .spec import AttackEntry, AuditSpec, ModelEntry, ThreatEntry


def check_values(spec: AuditSpec) -> None:
    """Check every entry by itself.

    Raises:
        InputError: a value that means nothing, and whose it is.
    """
    check_count(spec.images, "images")
    if spec.max_rows != "auto":
        check_count(spec.max_rows, "max_rows")
    for model in spec.models:
        with _of(f"model {model.name}"):
            _check_model(model)
    for threat in spec.threats:
        with _of(f"threat {threat.name}"):
            _check_threat(threat)
    for attack in spec.attacks:
        with _of(f"attack {attack.name}"):
            _check_attacker(attack)


def _check_model(model: ModelEntry) -> None:
    if model.images is not None:
        check_count(model.images, "images")
    check_threat("l2", None, model.levels)


def _check_threat(threat: ThreatEntry) -> None:
    check_threat(threat.norm, threat.epsilon, threat.levels)
    if isinstance(threat.targets, int):
        check_count(threat.targets, "a target", 0)
    _check_attacker(threat)


def _check_attacker(entry: AttackEntry | ThreatEntry) -> None:
    """What an attack may say of itself in place of its threat model."""
    if entry.knowledge is not None:
        check_knowledge_name(entry.knowledge)
    if entry.eot is not None:
        check_count(entry.eot, "eot")
    if entry.accounts not in (None, "any"):
        check_count(entry.accounts, "accounts")


@contextmanager
def _of(entry: str) -> Iterator[None]:
    """Errors that say whose value it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{entry}: {error}") from None
