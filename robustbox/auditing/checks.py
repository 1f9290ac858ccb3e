"""Whether the values of an audit's entries mean anything, whatever they are combined with: a typo leaves no cell out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from robustbox.certificates import Certifier
from robustbox.errors import InputError
from robustbox.inputs import check_count, check_threat
from robustbox.oracle import check_knowledge_name

from .spec import AttackEntry, AuditSpec, CertifyEntry, ModelEntry, PreflightEntry, ThreatEntry, Threshold

_SHARES = ("clean-accuracy", "robust-accuracy", "success", "false-positives", "detection-misses", "certified-accuracy")
"""The metrics that are shares; the others have no upper end."""


def check_values(spec: AuditSpec) -> None:
    """Check every entry by itself.

    Raises:
        InputError: a value that means nothing, and whose it is.
    """
    check_count(spec.images, "images")
    if spec.max_rows != "auto":
        check_count(spec.max_rows, "max_rows")
    _check_price(spec.price_per_1000)
    with _of("preflight"):
        _check_preflight(spec.preflight)
    for model in spec.models:
        with _of(f"model {model.name}"):
            _check_model(model)
    for threat in spec.threats:
        with _of(f"threat {threat.name}"):
            _check_threat(threat)
    for attack in spec.attacks:
        with _of(f"attack {attack.name}"):
            _check_attacker(attack)
    for entry in spec.certify:
        with _of(entry.name):
            _check_certify(entry)
    for threshold in spec.thresholds:
        with _of(f"threshold {threshold.name}"):
            _check_threshold(threshold)


def _check_preflight(entry: PreflightEntry) -> None:
    check_count(entry.images, "images")
    check_count(entry.copies, "copies", 0)
    check_count(entry.benign, "benign", 0)


def _check_model(model: ModelEntry) -> None:
    if model.images is not None:
        check_count(model.images, "images")
    check_threat("l2", None, model.levels)
    _check_price(model.price_per_1000)
    speed = model.rows_per_second
    if speed is not None and not 0 < speed < math.inf:
        raise InputError(f"rows_per_second must be a positive number, not {speed:g}")


def _check_price(price: float | None) -> None:
    if price is not None and not 0 <= price < math.inf:
        raise InputError(f"price_per_1000 must be a number of at least 0, not {price:g}")


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


def _check_certify(entry: CertifyEntry) -> None:
    sigma = 1.0 if entry.sigma is None else entry.sigma  # where none is given, the model's own smoothing has it
    Certifier(sigma, entry.n0, entry.n, entry.alpha)
    for radius in entry.radii or []:
        _check_radius(radius)


def _check_threshold(threshold: Threshold) -> None:
    most = 1.0 if threshold.metric in _SHARES else math.inf
    for end in ("min", "max"):
        bound = getattr(threshold, end)
        if bound is not None and not 0 <= bound <= most:
            kind = "a share from 0 to 1" if most == 1 else "a number of at least 0"
            raise InputError(f"{end} must be {kind}, not {bound:g}")
    _check_radius(threshold.radius)


def _check_radius(radius: float) -> None:
    if not 0 <= radius < math.inf:
        raise InputError(f"a radius must be a number of at least 0, not {radius:g}")


@contextmanager
def _of(entry: str) -> Iterator[None]:
    """Errors that say whose value it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{entry}: {error}") from None
