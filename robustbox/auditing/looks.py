"""What looks at a defended model leave in an audit's folder: what was seen, and the rows of those that ended early."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from robustbox.folder import finite, replace_file

from .preflight import Subject, look
from .spec import PreflightEntry


def look_once(path: Path, lost: Path, subject: Subject, entry: PreflightEntry) -> dict[str, Any]:
    """What the pre-flight saw, which stands in `path` once a look came to its end.

    A look that fails, or is stopped, is taken again the next time; what it asked is added to what stands in `lost`.
    """
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    path.parent.mkdir(exist_ok=True)
    ledger: Counter[str] = Counter()
    whole = False
    try:
        seen: dict[str, Any] = finite(look(subject, entry, ledger))
        if seen["error"] is None:
            replace_file(path, plain_json(seen))
            whole = True
    finally:
        if ledger and not whole:
            replace_file(lost, plain_json(ledger + read_lost(lost)))
    return seen


def read_lost(path: Path) -> Counter[str]:
    """Rows by ledger of looks that did not come to their end."""
    return Counter(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})


def plain_json(value: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
