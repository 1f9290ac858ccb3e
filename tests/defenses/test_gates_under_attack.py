"""Real attacks on a real model through Blacklight: how soon it speaks, and that fusion changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.defenses.blacklight import Blacklight
from robustbox.defenses.gate import StatefulDefense, StatefulGate
from robustbox.defenses.standing import Standing


def standings(
    attack: str, defense: StatefulDefense, images: int = 5, budget: int = 45, fused: int = 64, **options: object
) -> list[Standing]:
    """What the gate holds against the attackers' accounts after a run on sample images."""
    data = rb.load_data("foolbox:cifar10")
    gate = defense.wrap(as_black_box(rb.load_model("cifar10-resnet20")), 0)
    assert isinstance(gate, StatefulGate)
    rows, labels = data.images[:images], data.labels[:images]
    rb.run_attack(gate, rows, labels, attack, budget=budget, keep_going=True, max_rows=fused, **options)  # type: ignore[arg-type]
    accounts = [int(account) for account in gate.statistics()["first_hit"]]  # type: ignore[attr-defined]
    return [standing for account in accounts if (standing := gate.standing(account)).rows == budget]


@pytest.mark.parametrize(
    ("attack", "soon", "options"),
    [
        ("nes", 2, {"norm": "linf", "epsilon": 0.05}),
        ("square", 2, {"norm": "linf", "epsilon": 0.05}),
        ("hop-skip-jump", 40, {}),
        ("qeba", 40, {}),
        ("surfree", 40, {}),
    ],
)
def test_standard_attacks_are_seen_soon(attack: str, soon: int, options: dict[str, object]) -> None:
    """P5: score attacks with their second query, label attacks when their first line search closes in."""
    seen = standings(attack, Blacklight(), **options)
    assert len(seen) >= 4  # every image that is classified correctly
    assert max(standing.first_hit for standing in seen) <= soon


@pytest.mark.parametrize(
    ("attack", "free", "needed", "setting"),
    [
        ("square", 1, 5, {"norm": "linf", "epsilon": 0.06}),
        ("hop-skip-jump", 1, 4, {"norm": "l2", "epsilon": 2.6}),
    ],
)
def test_oars_passes_where_the_attack_itself_does_not(
    attack: str, free: int, needed: int, setting: dict[str, Any]
) -> None:
    """P6 and P7 in small: what ends at its first refusal keeps its free successes; OARS breaks most, at few refusals."""
    data, model = rb.load_data("foolbox:cifar10"), rb.load_model("cifar10-resnet20")
    found = {
        scheme: rb.run_attack(
            model, data.images[:7], data.labels[:7], f"{scheme}:{attack}", budget=300, defense=Blacklight(), **setting
        )
        for scheme in ("abort", "oars")
    }
    assert int(found["abort"].success_any.sum()) <= free
    assert int(found["oars"].success_any.sum()) >= needed
    assert found["oars"].rejected.sum() <= 0.15 * found["oars"].queries.sum()


def test_a_run_through_a_real_gate_does_not_depend_on_fusion() -> None:
    """P12: rejections inside a pass of 512 rows, of 7, and of a single image."""
    defense = Blacklight(action="ban", strikes=20)
    found = [standings("hop-skip-jump", defense, fused=fused) for fused in (512, 7)]
    assert found[0] == found[1]
    assert standings("hop-skip-jump", defense, images=1) == found[0][:1]
