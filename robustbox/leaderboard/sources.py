"""What a leaderboard is made of, found on disk: runs, certificates, false positives, and entries made before."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from robustbox.errors import InputError
from robustbox.folder import ADVERSARIALS, CONFIG, RESULTS, SCHEMA

KIND = "robustbox leaderboard entry"
CERTIFIED, BENIGN = "certified.json", "benign"


@dataclass(frozen=True)
class Run:
    """A complete run's folder.

    Args:
        path: the folder.
        name: the folder, as seen from the path under which it was found.
        document: its results.json.
    """

    path: Path
    name: str
    document: dict[str, Any]

    @cached_property
    def config(self) -> dict[str, Any]:
        """What ran, as config.yaml says."""
        found: dict[str, Any] = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        return found

    def hashes(self) -> dict[str, str]:
        """The sha256 of each file that a row stands on."""
        files = {"config_sha256": CONFIG, "results_sha256": RESULTS, "adversarials_sha256": ADVERSARIALS}
        return {name: file_sha256(self.path / file) for name, file in files.items()}


@dataclass
class Sources:
    """Everything found.

    Attributes:
        runs: complete runs.
        certificates: (content of certified.json, its hash).
        benign: false positives of gates on rows that nobody attacked, as audits write them.
        entries: what says of itself that it is one.
    """

    runs: list[Run] = field(default_factory=list)
    certificates: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    benign: list[dict[str, Any]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)


def find(paths: Iterable[Path]) -> Sources:
    """What stands under some paths; runs that did not end, or began from given rows, are passed over, with a line on stderr.

    Raises:
        InputError: a path that is not there, or a file that cannot be read.
    """
    sources, seen = Sources(), set[Path]()
    for root in paths:
        if not root.exists():
            raise InputError(f"there is no {root}")
        for path in [root] if root.is_file() else sorted(root.rglob("*.json")):
            if path.resolve() not in seen:  # roots may overlap
                seen.add(path.resolve())
                _take(path, root, sources)
    return sources


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _take(path: Path, root: Path, sources: Sources) -> None:
    """Sort a file in where it belongs; other people's JSON is left alone."""
    if path.name == RESULTS:
        document = read_json(path)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA or "images" not in document:
            return
        whole = document.get("complete", True) and all(i["stop_reason"] != "stopped" for i in document["images"])
        if not whole or not (path.parent / ADVERSARIALS).exists() or not (path.parent / CONFIG).exists():
            print(f"passed over {path.parent}: the run did not end", file=sys.stderr)
            return
        if document.get("starts"):
            print(f"passed over {path.parent}: it began from given rows, whose cost is not known", file=sys.stderr)
            return
        if any(image["stop_reason"] == "total-budget" for image in document["images"]):
            print(f"passed over {path.parent}: its total budget ended before its images' own", file=sys.stderr)
            return
        name = path.parent.relative_to(root).as_posix() if root.is_dir() else path.parent.name
        sources.runs.append(Run(path.parent, name if name != "." else path.parent.resolve().name, document))
    elif path.name == CERTIFIED:
        sources.certificates.append((read_json(path), file_sha256(path)))
    elif path.parent.name == BENIGN:
        sources.benign.append(read_json(path))
    else:
        content = read_json(path) if path.parent.name == "entries" or root.is_file() else None
        if isinstance(content, dict) and content.get("kind") == KIND:
            sources.entries.append(content)
        elif root.is_file():
            raise InputError(f"{path} is neither a run's results, nor a certificate, nor an entry of a leaderboard")
