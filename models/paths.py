"""Where something stands in a JSON document: `predictions[0].scores`, `outputs[*].label`, `$` for all of it.

A path is keys joined by dots, `[i]` for an element of a list (from its end where negative) and `[*]` for each of them: what
follows is then taken of each, and the path leads to a list.
"""

from __future__ import annotations

import re
from typing import Any

from robustbox.errors import InputError

Path = tuple[str | int | None, ...]
"""Keys, positions, and None for each."""

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\*|-?\d+)\]")


def read_path(text: str) -> Path:
    """The path that a text describes.

    Raises:
        InputError: it describes none.
    """
    steps: list[str | int | None] = []
    rest = text.removeprefix("$")
    while rest:
        step = _STEP.match(rest)
        if step is None:
            raise InputError(f"'{text}' is no path: a path looks like predictions[0].scores, outputs[*].label or $")
        key, position = step.groups()
        steps.append(key if key is not None else None if position == "*" else int(position))
        rest = rest[step.end() :]
    return tuple(steps)


def follow(document: Any, path: Path) -> Any:
    """What stands at a path.

    Raises:
        ValueError: nothing does.
    """
    for number, step in enumerate(path):
        if step is None:
            if not isinstance(document, list):
                raise ValueError(f"no list at {_typed(path[:number])}")
            return [follow(element, path[number + 1 :]) for element in document]
        try:
            fits = isinstance(document, list if isinstance(step, int) else dict)
            document = document[step] if fits else None
        except (KeyError, IndexError):
            fits = False
        if not fits:
            raise ValueError(f"nothing at {_typed(path[: number + 1])}")
    return document


def _typed(path: Path) -> str:
    """A path as it is written."""
    return "$" + "".join(f".{step}" if isinstance(step, str) else f"[{'*' if step is None else step}]" for step in path)
