"""The tables in the documentation are those of the classes, and of the cells that were run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from robustbox import list_attacks, registry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/attacks.md"


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


def test_the_table_of_gates_is_that_of_its_cells(tmp_path: Path) -> None:
    """What a gate remembers is measured where it does not depend on the attack: once for each gate."""
    command = [sys.executable, "scripts/eval_stateful.py", "--render", "--table", str(tmp_path / "table.md")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    page = (tmp_path / "table.md").read_text()
    assert page == (ROOT / "docs/stateful-table.md").read_text()
    attacks, gates = page.split("## Benign queries")
    assert "bytes" not in attacks
    figures = re.findall(r"^\| ([\w-]+) \|.* ([\d,]+) \|$", gates, flags=re.MULTILINE)
    assert [name for name, _ in figures] == ["blacklight", "piha", "osd", "qpa", "gwad", "blacklight-keyed"]
