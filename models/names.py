"""Names with options, `NAME?key=value&key=value`, and other people's errors in one line."""

from __future__ import annotations

from urllib.parse import parse_qsl

from robustbox.errors import InputError, unknown_name


def split_options(text: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The name and its options.

    Raises:
        InputError: an option that is not among the known ones, or has no value.
    """
    name, _, query = text.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise InputError(f"'{text}' must look like NAME?{known[0]}=VALUE") from error
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known)
    return name, options


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
