"""The table of attacks in the documentation is that of the classes."""

from __future__ import annotations

import re
from pathlib import Path

from robustbox import list_attacks, registry

PAGE = Path(__file__).parents[2] / "docs/attacks.md"


def test_the_table_of_attacks_is_true() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line[:1] == "|"
    ]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].startswith("`")}
    assert list(table) == list_attacks()
    for name, (sees, norms, targeted, knobs, cost, source, _) in table.items():
        attack = registry.load("attacks", name)
        both = isinstance(attack.knowledge, property)  # it depends on the options
        assert sees == ("label or score" if both else attack.knowledge), name
        assert norms.split(", ") == list(attack.norms), name
        assert targeted == ("yes" if attack.targeted else "no"), name
        assert tuple(re.findall(r"`([\w-]+)`", knobs)) == attack.knobs, name
        assert cost, name
        assert source, name
