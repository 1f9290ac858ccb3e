"""What an audit costs at most: rows, money, and time as far as a speed is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .cells import read_cell
from .plan import Plan, System
from .spec import AuditSpec


@dataclass(frozen=True)
class Estimate:
    """The worst case of some cells.

    Args:
        cells: how many.
        rows: by ledger.
        seconds: at the speed of the black boxes alone, the attacks' own computing not included; None where a speed is unknown.
        price: in the audit's currency; None where no price is stated.
        currency: the audit's.
    """

    cells: int
    rows: dict[str, int]
    seconds: float | None
    price: float | None
    currency: str

    def plain(self) -> dict[str, Any]:
        """For audit.json."""
        return asdict(self)


def estimate(
    spec: AuditSpec,
    plan: Plan,
    seen: dict[str, dict[str, Any]],
    looked: dict[str, int],
    certified: dict[str, int],
    everything: bool = False,
) -> Estimate:
    """The estimate of a plan, from stated speeds or from those that the pre-flight saw; with what is done, where asked.

    Args:
        spec, plan: the audit.
        seen: what the pre-flight saw, by the id of the defended model.
        looked, certified: rows that looks at defended models, and their certificates, will cost at most, by id.
        everything: with what is done.
    """
    rows: dict[str, int] = {}
    seconds: float | None = 0.0
    price: float | None = 0.0
    cells = 0
    for system in plan.systems:
        due = [cell for cell in plan.of(system) if everything or read_cell(cell.folder) is None]
        cells += len(due)
        for cell in due:
            for phase, n in plan.worst[cell.id].items():
                rows[phase] = rows.get(phase, 0) + n
        extra = {"verify": looked.get(system.id, 0), "certify": certified.get(system.id, 0)}
        for phase, n in extra.items():
            if n:
                rows[phase] = rows.get(phase, 0) + n
        total, rate = plan.rows(due) + sum(extra.values()), _rate(system, seen.get(system.id))
        cost = spec.price_per_1000 if system.model.price_per_1000 is None else system.model.price_per_1000
        if total:
            seconds = None if seconds is None or rate is None else seconds + total / rate
            price = None if price is None or cost is None else price + total / 1000 * cost
    return Estimate(cells, rows, seconds, price, spec.currency)


def _rate(system: System, seen: dict[str, Any] | None) -> float | None:
    """Rows a second."""
    if system.model.rows_per_second is not None:
        return system.model.rows_per_second
    milliseconds = (seen or {}).get("milliseconds_per_row")
    return 1000 / milliseconds if milliseconds else None
