"""The run's folder: the documented schema holds field by field, files appear whole, and nothing is ever overwritten."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from robustbox.environment import environment
from robustbox.errors import InputError
from robustbox.folder import open_run, read_run
from robustbox.results import AttackResult
from tests.schema import check_document

SHAPE = (1, 2, 2)


def outcome() -> AttackResult:
    """Three images by hand: one won at query 7, one never, one misclassified; under a defense, with a target."""
    adversarials = torch.full((3, *SHAPE), torch.nan)
    adversarials[0] = 0.25
    images = [{"sha256": f"{i:064x}", "label": i, "target": 2 if i else None} for i in range(3)]
    meta = {
        "model": {"name": "planted", "stochastic": False, "sha256": None},
        "defense": [{"name": "input-noise", "options": {"sigma": 0.02}}],
        "pipeline": [
            {"name": "planted behind a gate", "stochastic": False, "options": {"action": "silent"}},
            {
                "name": "planted",
                "stochastic": True,
                "statistics": {"rows": 240, "first_hit": {"7": 5}},
                "places": ["fc"],
            },
        ],
        "attack": {"name": "cgba", "options": {"sigma": None, "steps": 30}},
        "norm": "l2",
        "epsilon": None,
        "targeted": True,
        "budget": 120,
        "total_budget": None,
        "knowledge": "label",
        "levels": 256,
        "keep_going": False,
        "starts": 0,
        "eot": 1,
        "accounts": None,
        "seed": 3,
        "stochastic": True,
        "stateful": False,
        "max_rows": 32,
        "seconds": {"clean": 0.1, "attack": 1.0, "verify": 0.2},
        "rows_per_second": float("inf"),
        "journal": {"sessions": 1, "in_flight": 0},
        "environment": environment(torch.device("cpu")),
        "images": images,
    }
    return AttackResult(
        success=np.array([True, False, False]),
        distance=np.array([0.5, np.nan, np.nan]),
        queries=np.array([120, 120, 0]),
        first_success=np.array([7, 0, 0]),
        adversarials=adversarials,
        ledger={"attack": 240, "verify": 53},
        clean_correct=np.array([True, True, False]),
        refusals=[[(5, 6), (9, 9)], [], []],
        accounts_burnt=np.array([1, 0, 0]),
        hits=[4, 0, None],
        first_hits=[5, 0, None],
        success_any=np.array([True, False, False]),
        success_fresh=np.array([True, False, False]),
        success_clean=np.array([True, False, False]),
        success_undefended=np.array([False, False, False]),
        fresh_draws=np.array([25, 0, 0]),
        fresh_fooled=np.array([20, 0, 0]),
        stop_reasons=["budget", "error", "misclassified"],
        errors=[None, "ValueError: planted", None],
        traces=[[(7, 0.75), (90, 0.5)], [], []],
        epsilon=None,
        meta=meta,
    )


def test_the_written_file_is_what_the_documentation_says(root: Path, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {"model": "planted"}) as folder:
        folder.write(outcome())
    check_document(json.loads((tmp_path / "run" / "results.json").read_text()), root / "docs" / "results.md")


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    result = outcome()
    with open_run(str(tmp_path / "deep" / "run"), {"seed": 3}) as folder:
        folder.write(result)
    document, adversarials = read_run(tmp_path / "deep" / "run")
    torch.testing.assert_close(adversarials, result.adversarials, rtol=0, atol=0, equal_nan=True)
    assert [image["distance"] for image in document["images"]] == [0.5, None, None]
    assert document["images"][0]["trace"] == [[7, 0.75], [90, 0.5]]
    assert document["rows_per_second"] is None
    assert document["summary"]["median_distance"] == {"50": None, "100": None, "120": None}  # one of two failed
    assert document["summary"]["success"]["hits"] == 1
    assert document["summary"]["success"]["of"] == 2
    assert yaml.safe_load((tmp_path / "deep" / "run" / "config.yaml").read_text()) == {"seed": 3}
    with safe_open(tmp_path / "deep" / "run" / "adversarials.safetensors", "pt") as file:
        hashes = json.loads(file.metadata()["sha256_of_originals"])
    assert hashes == [image["sha256"] for image in document["images"]]


def test_adversarials_of_any_layout_are_written(tmp_path: Path) -> None:
    result = outcome()
    strided = result.adversarials.expand(2, *result.adversarials.shape).transpose(-1, -2)[0]
    with open_run(tmp_path, {}) as folder:
        folder.write(replace(result, adversarials=strided))
    torch.testing.assert_close(read_run(tmp_path)[1], strided, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["config.yaml", "results.json", "adversarials.safetensors"])
def test_a_folder_that_holds_another_run_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(InputError, match="holds another run"):
        open_run(tmp_path, {})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "theirs"}


def test_of_two_runs_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {}), pytest.raises(InputError, match="another run is writing to"):
        open_run(tmp_path / "run", {})


def test_other_peoples_files_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with open_run(tmp_path, {}) as folder:
        folder.write(outcome())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"is a file|cannot be written to: Not a directory"):
            open_run(out, {})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may write to read-only folders, so the system is asked to say no
    with pytest.raises(InputError, match="cannot be written to: Permission denied"):
        open_run(tmp_path / "run", {})


def test_bad_input_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(InputError), open_run(tmp_path / "run", {}):
        assert (tmp_path / "run" / "config.yaml").exists()
        raise InputError("planted")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError), open_run(tmp_path, {}):
        raise InputError("planted")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run", {}) as folder:
        folder.write(outcome())
        raise KeyboardInterrupt
    assert read_run(tmp_path / "run")[0]["images"][0]["queries"] == 120


def test_results_come_last_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    def replace_and_note(part: os.PathLike[str], path: os.PathLike[str]) -> None:
        assert Path(part).stat().st_size > 0
        assert not Path(path).exists()
        moved.append(Path(path).name)
        os.rename(part, path)

    monkeypatch.setattr(os, "replace", replace_and_note)
    with open_run(tmp_path, {}) as folder:
        folder.write(outcome())
    assert moved == ["config.yaml", "adversarials.safetensors", "results.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "journal.sqlite", *moved}


def test_no_folder_means_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run(None, {}) as folder:
        folder.write(outcome())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "other schema"])
def test_an_incomplete_folder_is_refused(tmp_path: Path, damage: str) -> None:
    with open_run(tmp_path, {}) as folder:
        folder.write(outcome())
    results, tensors = tmp_path / "results.json", tmp_path / "adversarials.safetensors"
    if damage == "missing":
        results.unlink()
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    else:
        results.write_text(results.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(InputError, match=r"holds no complete run|was written by schema 99"):
        read_run(tmp_path)


def test_the_environment_names_no_machine_and_no_person() -> None:
    found = json.dumps(environment(torch.device("cpu")))
    assert os.uname().nodename not in found
    assert str(Path.home()) not in found
    assert torch.__version__ in found
