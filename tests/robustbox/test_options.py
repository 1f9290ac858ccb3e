"""Options of attacks and defenses: what is of another type than its class states is refused by one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from robustbox import inputs, registry
from robustbox.defenses.blacklight import Blacklight
from robustbox.errors import InputError
from robustbox.options import check_options


@dataclass
class Made:
    """One option of every kind."""

    word: Literal["one", "two", 3] = "one"
    count: int = 1
    share: float | None = 0.5
    on: bool = False
    text: str | None = None
    other: list[int] | str = field(default_factory=list)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word": 3},
        {"share": 1},
        {"share": None},
        {"share": np.float32(0.5), "count": np.int64(3)},
        {"text": "", "on": True},
        {"other": {"what": "a class looks at by itself"}},
    ],
)
def test_what_is_of_its_type(options: dict[str, Any]) -> None:
    check_options("made", Made(**options))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"word": "on"}, "word of made must be one or two or 3, not 'on'"),
        ({"word": 3.0}, "word of made must be one or two or 3, not 3.0"),
        ({"count": 1.0}, "count of made must be a whole number, not 1.0"),
        ({"count": True}, "count of made must be a whole number, not True"),
        ({"share": "0.5"}, "share of made must be a number or null, not '0.5'"),
        ({"share": float("nan")}, "share of made must be a number or null, not nan"),
        ({"on": 1}, "on of made must be true or false, not 1"),
        ({"text": 1}, "text of made must be text or null, not 1"),
    ],
)
def test_what_is_not(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError) as error:
        check_options("made", Made(**options))
    assert str(error.value) == complaint


def test_every_default_is_of_its_type() -> None:
    for name in registry.names("attacks"):
        inputs.resolve_attack(name, None)
    built = inputs.resolve_defenses([name for name in registry.names("defenses") if name != "zo-ae-ds"], None)
    assert len(built) > 10


def test_a_gate_is_not_switched_off_by_a_misspelt_word() -> None:
    for defense, options in (("blacklight", {"action": "rejct"}), (Blacklight(action="banned"), None)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="action of blacklight must be reject or ban or silent or decoy"):
            inputs.resolve_defenses(defense, options)
