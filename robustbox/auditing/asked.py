"""The rows that an audit's cells asked, those of runs that failed, were stopped or were given up too: `rows/ID.json`.

A run that goes on is told again by its journal what was answered, and its ledger counts that once more from the beginning: the
file never says less than it said. A run that begins anew asks anew: what was asked before stays counted beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from robustbox.contest import Contest
from robustbox.folder import RunFolder, replace_file
from robustbox.ledger import WrittenLedger


def count_rows(contest: Contest, folder: RunFolder, cell: Path) -> None:
    """Write down the rows of a contest before they are asked.

    Args:
        contest: it has asked nothing yet.
        folder: its run's, open.
        cell: the folder of the cell that it is, or is a shard of.
    """
    assert folder.path is not None
    assert folder.journal is not None
    part = "" if folder.path == cell else f".{folder.path.name}"
    path = _room(cell) / f"{cell.name}{part}.json"
    then = _read(path)
    goes_on = folder.journal.sent > 0
    given_up, asked = (then["given_up"], then["run"]) if goes_on else (sum(then.values()), 0)
    again = folder.journal.in_flight if goes_on else 0

    def content(ledger: Counter[str]) -> bytes:
        return json.dumps({"given_up": given_up, "again": again, "run": max(asked, ledger.total())}).encode()

    path.parent.mkdir(exist_ok=True)
    replace_file(path, content(Counter()))  # at once: while it is counted on it must not get shorter
    contest.keep_books(WrittenLedger(path, content))


def rows_asked(cell: Path, ledger: Mapping[str, int] | None) -> int:
    """The rows that a cell and its shards asked.

    Args:
        cell: its folder.
        ledger: that of its results, which counts where an older version ran it.
    """
    own = _room(cell) / f"{cell.name}.json"
    files = [own] * own.exists() + sorted(_room(cell).glob(f"{cell.name}.??????-??????.json"))
    return sum(sum(_read(path).values()) for path in files) if files else sum((ledger or {}).values())


def _room(cell: Path) -> Path:
    return cell.parent.parent / "rows"


def _read(path: Path) -> dict[str, int]:
    """Rows of runs that were given up, of passes that were sent again since no answer was heard, and of the run's ledger."""
    if not path.exists():
        return {"given_up": 0, "again": 0, "run": 0}
    return dict(json.loads(path.read_text(encoding="utf-8")))
