"""The folder of a certification: who may write to it, and what stands in it from an earlier session."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustbox.certificates import Certificate
from robustbox.errors import InputError
from robustbox.folder import LOCK, check_lockable, replace_file

CONFIG, IDENTITY, IMAGES, CERTIFIED = "config.yaml", "identity.json", "images.jsonl", "certified.json"
ASKED = "rows.txt"
"""How many rows all sessions asked."""
KIND = "certification"
"""Whose folder it is, for messages."""


def check_claim(folder: Path, command: str, identity: Mapping[str, Any]) -> None:
    """Refuse a folder, made or not, that `claim` would refuse; nothing is made.

    Args:
        folder: of a certification.
        command: what is certified and how, as `config.yaml` there would say.
        identity: what the names in it stand for: those of another one are certificates of something else.

    Raises:
        InputError: it holds something else, cannot be written to, or another certification is running in it.
    """
    check_lockable(folder, KIND)
    _refuse(folder, command, identity)


def _refuse(folder: Path, command: str, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else, or certificates of something else."""
    try:
        if not (folder / CONFIG).exists():
            if folder.exists() and any(path.name not in (IDENTITY, LOCK) for path in folder.iterdir()):
                raise InputError(f"the output folder {folder} holds something else: choose another one")
            return
        if (folder / CONFIG).read_text(encoding="utf-8") != command:
            raise InputError(f"the output folder {folder} holds another certification: choose another one")
        then = json.loads((folder / IDENTITY).read_text(encoding="utf-8")) if (folder / IDENTITY).exists() else {}
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be read: {error.strerror}") from error
    if changed := [what for what, value in then.items() if value != json.loads(json.dumps(identity[what]))]:
        raise InputError(f"the output folder {folder} holds certificates of other {changed[0]}: choose another one")


def claim(folder: Path, command: str, identity: Mapping[str, Any]) -> list[Certificate]:
    """Take a folder that is locked, new or left by the same command, and give what is certified in it already.

    Args:
        folder, command, identity: as for `check_claim`.

    Raises:
        InputError: it holds something else, or cannot be written to.
    """
    _refuse(folder, command, identity)
    try:
        if not (folder / CONFIG).exists():
            replace_file(folder / IDENTITY, (json.dumps(identity) + "\n").encode())
            (folder / CONFIG).write_text(command, encoding="utf-8")
        book = folder / IMAGES
        lines = book.read_text(encoding="utf-8").splitlines(keepends=True) if book.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
        book.write_text("".join(whole), encoding="utf-8")
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be written to: {error.strerror}") from error
    return [Certificate(*json.loads(line)) for line in whole]


def asked(folder: Path, least: int = 0) -> int:
    """The rows that all sessions asked; `least` in a folder that does not say: new, or of an older version."""
    path = folder / ASKED
    return int((path.read_text(encoding="utf-8") if path.exists() else "") or least)
