"""Plain values from a file as dataclasses, with one clear line for what does not fit."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from robustbox.errors import InputError, unknown_name

T = TypeVar("T")


def read(cls: type[T], content: object, where: str, shorthand: Mapping[type, str]) -> T:
    """A dataclass from a mapping of its fields.

    Args:
        cls: the dataclass; its fields may be plain values, lists, mappings, unions, and dataclasses again.
        content: what the file holds.
        where: what the error calls it.
        shorthand: for dataclasses that may also stand as one bare value: the field that it means.

    Raises:
        InputError: an unknown or missing field, or a value of the wrong type.
    """
    if not isinstance(content, Mapping) and cls in shorthand:
        content = {shorthand[cls]: content}
    if not isinstance(content, Mapping):
        raise InputError(f"{where} must hold fields by name, not {content!r}")
    hints = get_type_hints(cls)
    for name in content:
        if name not in hints:
            raise unknown_name(f"field of {where}", str(name), hints)
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in content and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where} lacks the field '{f.name}'")
    place = "" if where == "the audit" else f" of {where}"
    return cls(**{name: _value(hints[name], item, f"{name}{place}", shorthand) for name, item in content.items()})


def _value(hint: Any, value: Any, where: str, shorthand: Mapping[type, str]) -> Any:
    if is_dataclass(hint):
        return read(hint, value, where, shorthand)  # type: ignore[arg-type]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is list and isinstance(value, list):
        return [_value(inner[0], item, f"number {k + 1} of {where}", shorthand) for k, item in enumerate(value)]
    if origin is list and inner[0] is str and isinstance(value, str):
        return [value]  # one pattern
    if not _fits(hint, value):
        raise InputError(f"{where} must be {_spelled(hint)}, not {value!r}")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and _only_float(hint) else value


def _fits(hint: Any, value: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(each, value) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(inner[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _only_float(hint: Any) -> bool:
    return hint is float or (float in get_args(hint) and int not in get_args(hint))


def _spelled(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spelled(each) for each in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner)) if len(inner) > 1 else str(inner[0])
    if origin is list:
        return "a list"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return plain.get(hint, "fields by name")
