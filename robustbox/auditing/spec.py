"""The audit's file: what is asked for, as dataclasses. Each list entry may also be a bare name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from robustbox.protocol import Norm

Metric = Literal[
    "clean-accuracy",
    "robust-accuracy",
    "success",
    "median-distance",
    "median-queries",
    "false-positives",
    "detection-misses",
    "accounts-burnt",
    "certified-accuracy",
]
ANY = ["*"]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model and the images that it is attacked on.

    Args:
        model: as `--model` of `python -m robustbox.attack`.
        name: how the audit calls it; default: the model's name.
        data: as `--data`; default: the model's own sample images.
        images: attack the first so many; default: the audit's number.
        levels: grey levels that its service takes; a threat model's own number goes before.
        price_per_1000: price of 1000 rows; default: the audit's.
        rows_per_second: its speed, for the estimate; default: what the pre-flight measures.
    """

    model: str
    name: str = ""
    data: str | None = None
    images: int | None = None
    levels: int | None = None
    price_per_1000: float | None = None
    rows_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class DefenseEntry:
    """What stands around a model: a name or file, a list of them (outermost first), or `none`.

    `models` are patterns of the models that it is put around.
    """

    defense: str | list[str] | None = None
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=lambda: list(ANY))


@dataclass(frozen=True, kw_only=True)
class AttackEntry:
    """An attack, and the patterns of what it is run against. `knowledge`, `eot` and `accounts` go before the threat model's."""

    attack: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    knowledge: str | None = None
    eot: int | None = None
    accounts: int | Literal["any"] | None = None
    models: list[str] = field(default_factory=lambda: list(ANY))
    defenses: list[str] = field(default_factory=lambda: list(ANY))
    threats: list[str] = field(default_factory=lambda: list(ANY))


@dataclass(frozen=True, kw_only=True)
class ThreatEntry:
    """A threat model: what the attacker may change by how much, what it aims at, what it sees, and what it may spend."""

    name: str = ""
    norm: Norm = "l2"
    epsilon: float | None = None
    targets: int | Literal["next", "random"] | None = None
    knowledge: str | None = None
    levels: int | None = None
    accounts: int | Literal["any"] = 1
    eot: int = 1
    keep_going: bool = False
    models: list[str] = field(default_factory=lambda: list(ANY))


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A bound that must hold wherever the patterns match.

    Args:
        metric: what is bounded.
        min, max: the bound; exactly one of them.
        confident: whether the worse end of the 95 % interval must hold it, and not only the estimate.
        radius: of `certified-accuracy`.
        name: how reports call it.
        models, defenses, attacks, threats: patterns of names. Where `attacks` names some, robust accuracy is that under these.
        budgets: numbers of queries; default: all.
    """

    metric: Metric
    min: float | None = None
    max: float | None = None
    confident: bool = False
    radius: float = 0.0
    name: str = ""
    models: list[str] = field(default_factory=lambda: list(ANY))
    defenses: list[str] = field(default_factory=lambda: list(ANY))
    attacks: list[str] = field(default_factory=lambda: list(ANY))
    threats: list[str] = field(default_factory=lambda: list(ANY))
    budgets: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class PreflightEntry:
    """How many rows the pre-flight may take of each defended model.

    Args:
        images: images that are asked (and as many blends of two), twice.
        copies: near copies of one image that are sent from one account.
        benign: natural images sent from one account, each once, to a stateful defense.
        benign_data: data set that they come from; default: the images of the data set that are not attacked, or those that
            are where there are no others.
    """

    images: int = 16
    copies: int = 60
    benign: int = 500
    benign_data: str | None = None


@dataclass(frozen=True, kw_only=True)
class CertifyEntry:
    """Which defended models are certified: those behind `smoothing` as they are, others smoothed with noise of `sigma`.

    The rest as in `python -m robustbox.certify`.
    """

    sigma: float | None = None
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    radii: list[float] | None = None
    models: list[str] = field(default_factory=lambda: list(ANY))
    defenses: list[str] = field(default_factory=lambda: list(ANY))

    @property
    def name(self) -> str:
        """For errors."""
        return "certify" if self.sigma is None else f"certify at {self.sigma:g}"


@dataclass(frozen=True, kw_only=True)
class AuditSpec:
    """A whole audit. `docs/audit.md` explains every field."""

    name: str = "audit"
    seed: int = 0
    device: str = "auto"
    images: int = 20
    max_rows: int | Literal["auto"] = 64
    price_per_1000: float | None = None
    currency: str = ""
    models: list[ModelEntry]
    defenses: list[DefenseEntry] = field(default_factory=lambda: [DefenseEntry()])
    attacks: list[AttackEntry]
    threats: list[ThreatEntry] = field(default_factory=lambda: [ThreatEntry()])
    budgets: list[int] = field(default_factory=lambda: [1000])
    preflight: PreflightEntry = field(default_factory=PreflightEntry)
    certify: list[CertifyEntry] = field(default_factory=list)
    thresholds: list[Threshold] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """The audit as plain YAML values, every default spelled out."""
        return asdict(self)


def matches(name: str, patterns: list[str]) -> bool:
    """Whether a name is one of the patterns' (`*` and `?` as in file names)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
