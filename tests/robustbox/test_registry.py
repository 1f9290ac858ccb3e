"""Names are found through entry points, ours and a third party's alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustbox import InputError, list_attacks, registry, run_attack
from tests.toys import HalfSpace, images

PACKAGE = '''"""A third party's attack."""
from dataclasses import dataclass
from robustbox import Attack, Query

@dataclass(frozen=True)
class Brighten(Attack):
    """Brightens the image."""
    name = "brighten"
    step: float = 0.3

    def search(self, task):
        yield Query((task.image + self.step).clamp(0, 1)[None])
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with an entry point, as pip would lay it out."""
    (tmp_path / "brighten.py").write_text(PACKAGE)
    info = tmp_path / "brighten-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brighten\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[robustbox.attacks]\nbrighten = brighten:Brighten\nbroken = no_such_package:Attack\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()
    sys.modules.pop("brighten", None)


@pytest.mark.usefixtures("third_party")
def test_a_third_partys_attack_is_listed_and_runs_by_name() -> None:
    assert "brighten" in list_attacks()
    assert registry.describe("attacks")["brighten"] == "Brightens the image."
    result = run_attack(HalfSpace(), images(2), [0, 0], "brighten", attack_options={"step": 0.4}, norm="l2", budget=5)
    assert result.success.all()
    assert result.meta["attack"] == {"name": "brighten", "options": {"step": 0.4}}


@pytest.mark.usefixtures("third_party")
def test_a_package_that_cannot_be_imported_is_one_clear_line_and_spoils_no_list() -> None:
    with pytest.raises(InputError, match="attack 'broken' cannot be loaded: No module named 'no_such_package'"):
        registry.load("attacks", "broken")
    assert "cannot be loaded" in registry.describe("attacks")["broken"]


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("attacks", "cbga", "unknown attack 'cbga': did you mean cgba"),
        ("attacks", "foolbx:HopSkipJumpAttack", "unknown attack 'foolbx:HopSkipJumpAttack'"),
        ("models", "cifar10-resnet", "did you mean cifar10-resnet20"),
        ("defenses", "zzz", "unknown defense 'zzz': known: "),
        ("data", "digit", "unknown data set 'digit': did you mean digits"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_ones(kind: registry.Kind, name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        registry.load(kind, name)


@pytest.mark.parametrize("kind", ["attacks", "defenses", "models", "data"])
def test_everything_that_is_listed_can_be_loaded_and_says_what_it_is(kind: registry.Kind) -> None:
    lines = registry.describe(kind)
    assert lines
    for name, line in lines.items():
        assert len(line) > 10, name
        assert "cannot be loaded" not in line
