"""An audit's report.html: verdicts, the matrix, what the pre-flight saw, a link to every run; one file that opens from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import flags_of
from .junit import complaint

if TYPE_CHECKING:
    from markupsafe import Markup

Document = dict[str, Any]


def write_audit_page(path: Path, document: Document) -> None:
    """Write the page of an audit.json."""
    from robustbox import pages  # here: templates cost what only an audit with a folder needs

    pages.write_page(
        path,
        "audit.html",
        audit=document,
        matrices=_matrices(document["cells"]),
        flags=flags_of({f"{system['model']}, {system['defense']}": system["flags"] for system in document["systems"]}),
        complaints={k: complaint(verdict) for k, verdict in enumerate(document["verdicts"]) if not verdict["holds"]},
        pairs=[{**row, "pair": pair} for row in document["rows"] for pair in row["pairs"]],
    )


def _matrices(cells: Sequence[Document]) -> list[Markup]:
    """For each threat model and budget a heat map: defended models by attacks, accuracy under each."""
    from robustbox.pictures import heat_map

    found = []
    for threat, budget in dict.fromkeys((cell["threat"], cell["budget"]) for cell in cells):
        its = [cell for cell in cells if (cell["threat"], cell["budget"]) == (threat, budget)]
        systems = list(dict.fromkeys((cell["model"], cell["defense"]) for cell in its))
        attacks = list(dict.fromkeys(cell["attack"] for cell in its))
        place = {(cell["model"], cell["defense"], cell["attack"]): cell for cell in its}
        matrix = [[_entry(place.get((*system, attack))) for attack in attacks] for system in systems]
        names = [model if defense == "none" else f"{model} behind {defense}" for model, defense in systems]
        caption = f"Accuracy under each attack: {threat}, {budget} queries an image"
        found.append(heat_map(names, attacks, matrix, corner="defended model", caption=caption))
    return found


def _entry(cell: Document | None) -> Document | None:
    if cell is None:
        return None
    if cell["robust_accuracy"] is None:
        return {"value": 0.0, "text": cell["status"], "note": "see below"}
    share = cell["robust_accuracy"]
    note = f"{100 * share['low']:.0f} to {100 * share['high']:.0f} %"
    href = f"{cell['folder']}/report.html"
    return {"value": share["share"], "text": f"{100 * share['share']:.0f} %", "note": note, "href": href}
