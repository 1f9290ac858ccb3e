"""A run's report: written with every run that has a folder, and what it says is what results.json says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from robustbox import run_attack
from robustbox.errors import ModelError
from robustbox.protocol import Answer
from robustbox.report import distances_at, milestones
from tests.toys import Failing, Gate, HalfSpace, Walk, images


def text_of(page: str) -> str:
    """What a reader sees, as one line."""
    body = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]+>", " ", page.partition("<body>")[2])
    return " ".join(body.split())


def test_a_run_writes_its_report(tmp_path: Path) -> None:
    result = run_attack(HalfSpace(), images(14), [0] * 14, Walk(), budget=30, out=tmp_path / "run")
    assert result.success.all()
    page = (tmp_path / "run" / "report.html").read_text()
    share = json.loads((tmp_path / "run" / "results.json").read_text())["summary"]["success"]
    text = text_of(page)
    assert "walk on" in text
    assert f"100.0 % (14 of 14) {100 * share['low']:.1f} to 100.0 %" in text
    assert page.count("data:image/png") == 3 * 12  # twelve images: original, adversarial, difference
    assert "What the gate refused" not in text
    assert text.count("broken budget") + text.count("held budget") == 0  # outcome and reason stand apart
    assert len(re.findall(r"\bbroken [\d.]+ \d+ \d+ budget", text)) == 14


def test_a_silent_gate_is_spoken_of(tmp_path: Path) -> None:
    for action in ("silent", "reject"):
        setting = {"defense": "blacklight", "defense_options": {"action": action}, "out": tmp_path / action}
        result = run_attack(HalfSpace(), images(3), [0] * 3, "cgba", budget=60, **setting)  # type: ignore[arg-type]
        assert sum(hits or 0 for hits in result.hits) > 0
        told = "A gate took" in text_of((tmp_path / action / "report.html").read_text())
        assert told == (action == "silent")


def test_refusals_are_drawn_where_a_gate_refused(tmp_path: Path) -> None:
    result = run_attack(Gate(4), images(3), [0] * 3, Walk(), budget=30, out=tmp_path / "run")
    assert result.rejected.any()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What the gate refused" in page
    runs = sum(len(runs) for runs in result.refusals)
    assert page.count('<rect class="refused"') == runs > 0


def test_a_run_that_ended_early_has_a_report(tmp_path: Path) -> None:
    failing = Failing(40, lambda answer: Answer.of(answer.labels[:-1]))
    with pytest.raises(ModelError):
        run_attack(failing, images(3), [0] * 3, Walk(), budget=30, out=tmp_path / "run")
    assert "stopped" in text_of((tmp_path / "run" / "report.html").read_text())


def test_distances_are_those_within_the_queries() -> None:
    traced = [
        {"trace": [[3, 2.0], [9, 1.0]], "success": True, "success_any": True},
        {"trace": [], "success": False, "success_any": False},
        {"trace": [[1, 0.5]], "success": False, "success_any": True},  # which the evaluator did not confirm
    ]
    assert distances_at(traced, [2, 3, 10]) == [
        [float("inf")] * 3,
        [2.0, *[float("inf")] * 2],
        [1.0, *[float("inf")] * 2],
    ]
    assert milestones(1) == [1]
    points = milestones(1000)
    assert (points[0], points[-1]) == (1, 1000)
    assert points == sorted(set(points))
