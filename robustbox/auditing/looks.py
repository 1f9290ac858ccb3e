"""What looks at a defended model leave in an audit's folder: what was seen, and the rows that all of them asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from robustbox.folder import finite, replace_file
from robustbox.ledger import WrittenLedger

from .preflight import Subject, look
from .spec import PreflightEntry


def look_once(path: Path, asked: Path, subject: Subject, entry: PreflightEntry) -> dict[str, Any]:
    """What the pre-flight saw, which stands in `path` once a look came to its end.

    A look that fails, or is stopped, is taken again the next time; `asked` counts the rows of all looks, before they are asked.
    """
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    path.parent.mkdir(exist_ok=True)
    before = read_asked(asked)
    ledger = WrittenLedger(asked, lambda now: plain_json(before + now))
    seen: dict[str, Any] = finite(look(subject, entry, ledger))
    if seen["error"] is None:
        replace_file(path, plain_json(seen))
    return seen


def read_asked(path: Path) -> Counter[str]:
    """Rows by ledger of all looks at a defended model, of those that did not come to their end too."""
    return Counter(json.loads((path.read_text(encoding="utf-8") if path.exists() else "") or "{}"))


def plain_json(value: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
