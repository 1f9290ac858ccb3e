"""Whether the options of attacks and defenses are of the types that their classes state: a misspelt word is not a choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from robustbox.errors import InputError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}


def check_options(name: str, made: object) -> None:
    """Refuse an attack or defense, a dataclass, whose options are not of the types of its fields.

    Looked at are words (`Literal`), numbers, truth values, text, None and unions of these; anything else is its class's own.

    Raises:
        InputError: which option, and what it must be.
    """
    if is_dataclass(made):
        values = {field.name: getattr(made, field.name) for field in fields(made) if field.init}
        check_values(name, type(made), values)


def check_values(name: str, factory: Any, values: Mapping[str, Any]) -> None:
    """The same before anything is made of the values; a factory that is no dataclass checks its own.

    Raises:
        InputError: which option, and what it must be.
    """
    if not is_dataclass(factory):
        return
    try:
        hints = get_type_hints(factory)
    except NameError:  # of a third party, who imports its types for type checkers alone
        return
    for option, value in values.items():
        kinds = _kinds(hints.get(option))
        if kinds and not any(_is(value, kind) for kind in kinds):
            raise InputError(f"{option} of {name} must be {' or '.join(map(_said, kinds))}, not {value!r}")


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type; none where one of them is not among those that are looked at."""
    origin = get_origin(hint)
    if origin is Literal:
        return [*get_args(hint)]
    if origin in (Union, UnionType):
        parts = [_kinds(part) for part in get_args(hint)]
        return [kind for part in parts for kind in part] if all(parts) else []
    return [hint] if hint in _WORDS else []


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind in _WORDS:
        return isinstance(value, kind)
    return type(value) is type(kind) and value == kind


def _said(kind: Any) -> str:
    return _WORDS.get(kind, str(kind))
