"""The folder that an audit is written to, checked before anything is made there."""

from __future__ import annotations

from pathlib import Path

from robustbox.errors import InputError
from robustbox.folder import CONFIG, JOURNAL, RESULTS, check_lockable


def check_no_run(folder: Path) -> None:
    """Refuse the folder of a run, whose report the audit's would overwrite.

    Raises:
        InputError: it is one.
    """
    if any((folder / name).exists() for name in (CONFIG, JOURNAL, RESULTS)):
        raise InputError(f"the audit's folder {folder} holds a run: choose another one")


def check_place(folder: Path) -> None:
    """Refuse a folder, made or not, that an audit would not take now; nothing is made.

    Raises:
        InputError: it holds a run, cannot be written to, or another audit is running in it.
    """
    check_no_run(folder)
    check_lockable(folder, "audit")
