"""Entries hold what planted runs make: unions over attacks, radii, budgets, adaptive attacks; nothing that was edited in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from robustbox.errors import InputError
from robustbox.leaderboard.entries import build
from robustbox.leaderboard.ranking import order, shared_budget, strongest
from robustbox.leaderboard.schema import check_entry
from robustbox.leaderboard.site import words_of
from robustbox.leaderboard.sources import find
from tests.leaderboard.planted import BLACKLIGHT, NOISE, plant
from tests.schema import check_document


def entries(folder: Path, **radii: list[float]) -> dict[str, dict[str, Any]]:
    return json.loads(json.dumps(build(find([folder]), radii)))  # type: ignore[no-any-return]


def hits(shares: dict[str, Any]) -> dict[str, int]:
    return {q: share["hits"] for q, share in shares.items()}


def test_the_best_known_attack_is_the_union_image_by_image(tmp_path: Path) -> None:
    plant(tmp_path / "one", [[(50, 0.9)], [(300, 0.5)], [(400, 2.0)], [], None])
    plant(tmp_path / "two", [[], [], [(120, 1.5), (450, 1.0)], [], None], attack="surfree")
    (entry,) = entries(tmp_path).values()
    (threat,) = entry["threats"]
    assert entry["clean_accuracy"]["hits"] == 4
    assert threat["budgets"] == [100, 250, 500]
    assert hits(threat["robust_accuracy"]) == {"100": 3, "250": 3, "500": 1}
    assert {a["attack"]["name"]: hits(a["robust_accuracy"]) for a in threat["attacks"]} == {
        "cgba": {"100": 3, "250": 3, "500": 2},
        "surfree": {"100": 4, "250": 4, "500": 3},
    }
    assert threat["robust_accuracy"]["500"]["of"] == 5
    assert threat["median_distance"]["500"]["value"] == pytest.approx(0.95)  # of 0.9, 0.5, 1.0 and infinity
    assert strongest(threat)["attack"]["name"] == "cgba"


def test_a_run_with_a_smaller_budget_counts_with_all_it_found_and_is_not_read_beyond(tmp_path: Path) -> None:
    plant(tmp_path / "long", [[], [(900, 0.1)]], budget=1000)
    plant(tmp_path / "short", [[(60, 0.1)], []], attack="surfree", budget=100)
    threat = entries(tmp_path)["planted"]["threats"][0]
    assert hits(threat["robust_accuracy"]) == {"100": 1, "250": 1, "500": 1, "1000": 0}
    assert list(threat["attacks"][1]["robust_accuracy"]) == ["100"]


def test_a_minimising_run_is_read_at_every_radius_that_is_named(tmp_path: Path) -> None:
    plant(tmp_path / "free", [[(10, 3.0), (90, 0.7)], [(20, 0.2)]], epsilon=None, budget=100)
    assert [t["epsilon"] for t in entries(tmp_path)["planted"]["threats"]] == [None]
    plant(tmp_path / "ball", [[], []], attack="surfree", epsilon=0.5, budget=100)
    found = {t["epsilon"]: hits(t["robust_accuracy"])["100"] for t in entries(tmp_path, l2=[1.0])["planted"]["threats"]}
    assert found == {0.5: 1, 1.0: 0}


def test_labels_count_where_scores_are_granted_and_not_the_other_way(tmp_path: Path) -> None:
    plant(tmp_path / "labels", [[(9, 0.1)], []])
    plant(tmp_path / "scores", [[], [(9, 0.1)]], attack="square", knowledge="score")
    found = {t["knowledge"]: hits(t["robust_accuracy"])["500"] for t in entries(tmp_path)["planted"]["threats"]}
    assert found == {"label": 1, "score": 0}


def test_chance_counts_only_what_was_confirmed(tmp_path: Path) -> None:
    folder = plant(tmp_path / "run", [[(9, 0.1)], [(9, 0.1)]], defense=NOISE, stochastic=True, eot=3)
    document = json.loads((folder / "results.json").read_text())
    document["images"][1]["success_fresh"] = False
    (folder / "results.json").write_text(json.dumps(document))
    (entry,) = entries(tmp_path).values()
    assert hits(entry["threats"][0]["robust_accuracy"])["500"] == 1
    assert entry["threats"][0]["adaptive"] == {"needs": ["eot"], "missing": []}


def test_rows_apart_by_weights_options_and_images(tmp_path: Path) -> None:
    plant(tmp_path / "a", [[], []])
    plant(tmp_path / "b", [[], [], []])
    plant(tmp_path / "c", [[], []], model={"name": "planted", "weights_sha256": "cd" * 32, "parameters": 7})
    plant(tmp_path / "d", [[], []], defense=BLACKLIGHT, stateful=True)
    names = list(entries(tmp_path))
    assert len(names) == 4
    assert "planted+blacklight" in names
    assert all(name.startswith("planted-") and len(name) == 16 for name in names if name != "planted+blacklight")


def test_no_adaptive_attack_no_place(tmp_path: Path) -> None:
    plant(tmp_path / "weak", [[(9, 0.1)], []])
    plant(tmp_path / "gate", [[], []], defense=BLACKLIGHT, stateful=True, refused=[3, 0])
    plant(tmp_path / "noise", [[], []], defense=NOISE, stochastic=True)
    made = entries(tmp_path)
    rows = [{"entry": entry, "threat": entry["threats"][0]} for entry in made.values()]
    placed = [(place, row["entry"]["name"]) for place, row in order(rows, 500)]
    assert placed == [(1, "planted"), (None, "planted+blacklight"), (None, "planted+input-noise")]
    gate = made["planted+blacklight"]["threats"][0]
    assert gate["adaptive"] == {"needs": ["oars"], "missing": ["oars"]}
    assert (gate["attacks"][0]["detected"]["hits"], gate["attacks"][0]["accounts_burnt"]) == (1, 1)
    plant(tmp_path / "oars", [[], []], attack="oars:surfree", defense=BLACKLIGHT, stateful=True)
    rows = [{"entry": entry, "threat": entry["threats"][0]} for entry in entries(tmp_path).values()]
    assert [place for place, _ in order(rows, 500)] == [1, 2, None]


def test_ties_share_a_place_and_what_was_not_measured_stands_last(tmp_path: Path) -> None:
    for k, (traces, budget) in enumerate([([[], []], 100), ([[], []], 500), ([[(9, 0.1)], []], 500), ([[], []], 500)]):
        plant(tmp_path / str(k), traces, budget=budget, model={"name": f"m{k}", "weights_sha256": None})  # type: ignore[arg-type]
    rows = [{"entry": entry, "threat": entry["threats"][0]} for entry in entries(tmp_path).values()]
    placed = [(place, row["entry"]["name"]) for place, row in order(rows, 500)]
    assert placed == [(1, "m1"), (1, "m3"), (3, "m2"), (None, "m0")]
    assert shared_budget([row["threat"] for row in rows]) == 100


def test_where_any_distance_counts_the_farther_median_is_better(tmp_path: Path) -> None:
    for name, far in (("near", 0.5), ("far", 2.0)):
        plant(tmp_path / name, [[(9, far)]] * 3, epsilon=None, model={"name": name, "weights_sha256": None})
    rows = [{"entry": entry, "threat": entry["threats"][0]} for entry in entries(tmp_path).values()]
    assert [row["entry"]["name"] for _, row in order(rows, 500)] == ["far", "near"]
    none = copy.deepcopy(rows[0])  # a model that classifies nothing correctly has no median, and stands last
    none["entry"]["name"] = "none"
    none["threat"]["median_distance"]["500"]["value"] = None
    none["threat"]["robust_accuracy"]["500"] = {"hits": 0, "of": 3, "share": 0.0}
    assert [row["entry"]["name"] for _, row in order([*rows, none], 500)] == ["far", "near", "none"]


def test_radii_that_differ_are_not_written_alike(tmp_path: Path) -> None:
    for name, radius in (("a", 8 / 255), ("b", 0.03137)):
        plant(tmp_path / name, [[(9, 0.01)]], norm="linf", epsilon=radius, model={"name": name, "weights_sha256": None})
    sections = {words for entry in entries(tmp_path).values() for words in map(words_of, entry["threats"])}
    assert sections == {"linf within 8/255 (0.03137), untargeted, labels", "linf within 0.03137, untargeted, labels"}


SMOOTHED = [{"name": "smoothing", "options": {"sigma": 0.25, "clip": False}}, *BLACKLIGHT]
OTHER = [{"name": "smoothing", "options": {"sigma": 0.5, "clip": False}}, *BLACKLIGHT]


def complete(folder: Path) -> dict[str, Any]:
    """An entry in which nothing is null that need not be."""
    both = {"stochastic": True, "stateful": True, "refused": [1, 0]}
    plant(folder / "run", [[(9, 0.1)], []], attack="oars:surfree", defense=SMOOTHED, **both)
    certificate = {
        "schema": 1,
        "model": {"name": "planted", "weights_sha256": "ab" * 32},
        "defense": BLACKLIGHT,
        "clip": False,
        "sigma": 0.25,
        "n": 1000,
        "alpha": 0.001,
        "norm": "l2",
        "images": [
            {"radius": 1.2, "correct": True},
            {"radius": 0.4, "correct": True},
            {"radius": 2.0, "correct": False},
        ],
        "summary": {"certified_accuracy": {"0.0": {}, "0.5": {}}},
    }
    (folder / "certified.json").write_text(json.dumps(certificate))
    (folder / "benign").mkdir()
    benign = {
        "schema": 1,
        "model": "planted",
        "defense": SMOOTHED,
        "refused": 1,
        "of": 200,
        "low": 0.0001,
        "high": 0.03,
    }
    (folder / "benign" / "x.json").write_text(json.dumps(benign))
    (entry,) = entries(folder).values()
    entry["cost"] = {"passes_per_query": 1.0, "time_ratio": 1.2, "milliseconds_per_query": 0.3, "device": "none"}
    return entry


def test_an_entry_is_what_its_documentation_says(root: Path, tmp_path: Path) -> None:
    entry = complete(tmp_path)
    check_entry(entry)
    check_document(entry, root / "docs" / "leaderboard-entries.md")


PROVEN = [(0, 2), (0.5, 1), (1, 1)]
"""Images by radius; 1 is the threat model's."""


def test_certificates_and_false_positives_find_their_defense(tmp_path: Path) -> None:
    entry = complete(tmp_path)
    assert [(its["radius"], its["accuracy"]["hits"]) for its in entry["certified"]["radii"]] == PROVEN
    plant(tmp_path / "bare", [[], []], defense=BLACKLIGHT)  # the certificate is of the smoothed model, not of this one
    plant(tmp_path / "other", [[], []], defense=OTHER)
    assert sorted(made["certified"] is not None for made in entries(tmp_path).values()) == [False, False, True]
    assert (entry["false_positives"]["hits"], entry["false_positives"]["of"]) == (1, 200)
    rounding = json.loads((tmp_path / "certified.json").read_text()) | {
        "levels": 2
    }  # of noisy rows; this model takes any
    (tmp_path / "certified.json").write_text(json.dumps(rounding))
    assert all(made["certified"] is None for made in entries(tmp_path).values())


def changed(entry: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """The entry with something else at `a.b.0.c`; REMOVE takes it out."""
    entry = copy.deepcopy(entry)
    *way, last = place.split(".")
    at: Any = entry
    for step in way:
        at = at[int(step) if isinstance(at, list) else step]
    if value is REMOVE:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return entry


REMOVE = object()
FORGED = {"hits": 2, "of": 2, "share": 1.0, "low": 0.99, "high": 1.0}


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("kind", "else", "`kind` is not"),
        ("schema", 99, "has schema 99"),
        ("model.name", 3, "model.name must be str, not 3"),
        ("model.weights_sha256", REMOVE, "model lacks weights_sha256"),
        ("certified.proof", "yes", "certified has proof, which nobody knows"),
        ("threats.0.budgets.0", True, r"threats\[0\].budgets\[0\] must be int, not True"),
        ("cost.time_ratio", float("nan"), "cost.time_ratio must be int or float, not nan"),
        ("threats.0.robust_accuracy.500", FORGED, "robust_accuracy.500 is not what 2 of 2 make"),
        ("name", "../up", "the name must do as a file's name"),
        ("threats", {}, "threats must be a list"),
    ],
)
def test_what_was_edited_in_is_refused(tmp_path: Path, place: str, value: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        check_entry(changed(complete(tmp_path), place, value))


def test_runs_that_did_not_end_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plant(tmp_path / "run", [[]])
    document = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**document, "complete": False}))
    assert entries(tmp_path) == {}
    assert "did not end" in capsys.readouterr().err
