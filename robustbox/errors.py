"""The errors that users meet: each is one clear line that says what is wrong and what to do."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

_NAMES = 40
"""Names that a line can hold; timm has a thousand."""


class InputError(ValueError):
    """Bad input, found before an attack spent a query. Command lines print it and end with exit code 2."""


class ModelError(RuntimeError):
    """The black box failed in mid-run: it raised, answered NaN, or answered another number of rows than it was asked.

    `run_attack` attaches what was found until then as `result` (an AttackResult), and it stands in the run's folder.
    """

    result: object | None = None


class StorageError(RuntimeError):
    """The run's folder can no longer be written to, as on a full disk. What is in its journal is safe, and the run goes on
    from there when the same command is given again.
    """


class OneLineParser(argparse.ArgumentParser):
    """A parser of words whose complaints are InputErrors, as all of bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help shows the options)")


def unknown_name(what: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that does not exist, with the nearest names that do, or some of all."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    more = f" and {len(known) - _NAMES} more" if len(known) > _NAMES else ""
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known[:_NAMES]) or 'none'}{more}"
    return InputError(f"unknown {what} '{name}': {hint}")
