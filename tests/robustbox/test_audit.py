"""Audits: every row is counted, what is done is not done again, a failure is one cell's, and the report is as documented."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

import robustbox as rb
from robustbox.attack import main as attack
from robustbox.audit import main
from robustbox.auditing.cells import Cell, Outcome, Work, run_cell
from robustbox.auditing.junit import complaint
from robustbox.auditing.loading import load
from robustbox.auditing.plan import System
from robustbox.auditing.preflight import Subject
from robustbox.auditing.run import Audit
from robustbox.auditing.systems import subject_of
from robustbox.auditing.world import World
from robustbox.defense_file import write_defense
from robustbox.defenses.bit_depth import BitDepth
from robustbox.errors import InputError, ModelError
from robustbox.oracle import Oracle
from robustbox.protocol import Answer
from tests.schema import check_document
from tests.toys import Failing, HalfSpace, images

DATA = {"planted": (images(12), torch.zeros(12, dtype=torch.int64))}
SPEC: dict[str, Any] = {
    "name": "toy",
    "images": 4,
    "budgets": [30],
    "models": [{"model": "spy", "data": "planted"}],
    "attacks": ["random", "square"],
    "threats": [{"norm": "linf", "epsilon": 0.3}],
    "preflight": {"images": 4, "copies": 5},
}
TIMES = ("written", "seconds", "milliseconds_per_row", "rows_per_second")


def audit(tmp_path: Path, boxes: dict[str, Any] | None = None, name: str = "out", **changes: Any) -> dict[str, Any]:
    """The audit.json of SPEC with changes."""
    models = boxes or {"spy": HalfSpace()}
    return rb.run_audit(SPEC | changes, tmp_path / name, models=models, data=DATA).document


def timeless(value: Any) -> Any:
    """A document without what two equal audits differ in."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_every_row_is_counted_and_planning_costs_none(tmp_path: Path) -> None:
    box = HalfSpace()
    plan = Audit(load(SPEC | {"defenses": ["none", "input-noise"]}), tmp_path / "out", World({"spy": box}, DATA)).plan
    assert box.rows == 0
    assert [plan.worst[cell.id] for cell in plan.cells] == [{"attack": 120, "verify": 8}] * 2 + [
        {"attack": 120, "verify": 4 * (25 + 25 + 1)}
    ] * 2
    document = audit(tmp_path, {"spy": box}, defenses=["none", "input-noise"])
    assert document["rows_asked"] == box.rows
    assert document["worst_case"]["rows"] == {
        "attack": 480,
        "verify": 424 + 2 * (8 * 4 + 6 + 8),
    }  # the looks: of 4 images, 5 copies, 8 others
    assert [system["preflight"]["rows"] for system in document["systems"]] == [{"verify": 4 * 4 + 6}] * 2
    assert document["rows_asked"] == sum(sum(cell["rows"].values()) for cell in document["cells"]) + 44


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    box = HalfSpace()
    first = audit(tmp_path, {"spy": box})
    asked = box.rows
    assert timeless(audit(tmp_path, {"spy": box})) == timeless(first)
    assert box.rows == asked
    more = audit(tmp_path, {"spy": box}, budgets=[30, 10])  # only what is new is asked
    assert box.rows - asked == sum(sum(c["rows"].values()) for c in more["cells"] if c["budget"] == 10)
    assert more["rows"][0]["robust_accuracy"] == first["rows"][0]["robust_accuracy"]


def test_the_written_file_is_what_the_documentation_says(tmp_path: Path, root: Path) -> None:
    models = {"spy": HalfSpace(), "broken": Failing(40, lambda answer: 1 / 0), "dead": Failing(0, lambda answer: 1 / 0)}  # type: ignore[arg-type, return-value]
    document = audit(
        tmp_path,
        models,
        models=[*({"model": name, "data": "planted"} for name in models), {"model": "digits-cnn", "images": 2}],
        certify=[{"sigma": 0.1, "n0": 5, "n": 20, "models": "digits-cnn"}],
        defenses=["none", {"defense": "blacklight", "models": "spy"}],
        attacks=["random", "square", "cgba"],
        thresholds=[{"metric": "success", "max": 0.5}],
    )
    check_document(json.loads((tmp_path / "out" / "audit.json").read_text()), root / "docs" / "audit.md")
    assert {cell["attack"] for cell in document["excluded"]} == {"cgba"}
    assert "cgba works in l2" in document["excluded"][0]["reason"]
    assert document["passed"] is False


def test_the_failure_of_one_cell_is_recorded_and_the_rest_runs(tmp_path: Path) -> None:
    sick = {"on": True}

    def wrong(answer: Answer) -> Answer:
        if sick["on"]:
            raise ConnectionError("the service is down")
        return answer

    models = {"spy": HalfSpace(), "sick": Failing(60, wrong)}  # the pre-flight takes 22 rows, the first cell the rest
    both = [{"model": name, "data": "planted"} for name in models]
    bound = [{"metric": "robust-accuracy", "min": 0.0}]
    document = audit(tmp_path, models, models=both, thresholds=bound)
    status = {(cell["model"], cell["attack"]): cell["status"] for cell in document["cells"]}
    assert status["spy", "random"] == status["spy", "square"] == "done"
    assert status["sick", "random"] == "failed"
    assert "the service is down" in next(cell["error"] for cell in document["cells"] if cell["status"] == "failed")
    assert [verdict["holds"] for verdict in document["verdicts"]] == [True, False]  # what failed was not measured
    assert {row["model"]: row["complete"] for row in document["rows"]} == {"spy": True, "sick": False}
    sick["on"] = False
    healed = audit(tmp_path, models, models=both, thresholds=bound)
    assert healed["passed"]
    assert {cell["status"] for cell in healed["cells"]} == {"done"}


class Stopped(HalfSpace):
    """A half-space that ends, while `on`, in the pass after its first `after` rows."""

    def __init__(self, end: type[BaseException]) -> None:
        super().__init__()
        self.end, self.after, self.on = end, 0, True

    def of(self, rows: torch.Tensor) -> Answer:
        if self.on and self.rows > self.after:
            raise self.end
        return super().of(rows)


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_rows_of_a_look_that_was_stopped_stay_counted(end: type[BaseException], tmp_path: Path) -> None:
    box = Stopped(end)
    for more in (0, 8, 16):  # in the first pass, in the second one, among the copies
        box.after = box.rows + more
        with contextlib.suppress(KeyboardInterrupt, torch.OutOfMemoryError):
            assert audit(tmp_path, {"spy": box})["rows_asked"] == box.rows  # a look that fails is no end
    (asked,) = (tmp_path / "out" / "preflight").iterdir()
    assert json.loads(asked.read_text()) == {"verify": box.rows}
    box.on = False
    for _ in range(2):
        document = audit(tmp_path, {"spy": box})
        assert document["rows_asked"] == box.rows
        assert document["systems"][0]["preflight"]["rows"] == {"verify": 22}


@pytest.mark.parametrize(("defenses", "clean"), [(["none"], 4), (["input-noise"], 4 * 25)])
def test_rows_of_cells_that_fail_stay_counted(defenses: list[str], clean: int, tmp_path: Path) -> None:
    """Whether the clean check ends them, whose journal goes, or the model does, whose journal goes on."""
    wrong = HalfSpace(threshold=-1.0)  # about every image
    for session in range(1, 4):
        document = audit(tmp_path, {"spy": wrong}, attacks=["random"], defenses=defenses)
        assert [cell["status"] for cell in document["cells"]] == ["failed"]
        assert document["rows_asked"] == wrong.rows
        look = sum(document["systems"][0]["preflight"]["rows"].values())
        assert wrong.rows == look + session * clean

    def ill(answer: Answer) -> Answer:
        if sick:
            raise ConnectionError("the service is down")
        return answer

    box = Failing(22 + clean + 6, ill)  # the pre-flight takes 22
    for sick in (True, True, False, False):
        document = audit(tmp_path, {"spy": box}, "sick", attacks=["random"], defenses=defenses)
        assert [cell["status"] for cell in document["cells"]] == ["failed" if sick else "done"]
        assert document["rows_asked"] == box.rows


def test_cells_of_another_model_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    data = {"planted": (DATA["planted"][0], module(DATA["planted"][0]).argmax(dim=1))}
    rb.run_audit(SPEC, tmp_path, models={"spy": module}, data=data)
    with torch.no_grad():
        module[1].weight += 1e-3
    with pytest.raises(InputError, match=r"spy has other weights than when .* was written: choose another folder"):
        rb.run_audit(SPEC, tmp_path, models={"spy": module}, data=data)


def test_results_about_another_defense_or_other_images_are_not_taken_for_these(tmp_path: Path) -> None:
    box, file = HalfSpace(), tmp_path / "own.safetensors"
    write_defense(file, BitDepth(bits=7), {})
    behind = {"models": {"spy": box}, "data": dict(DATA)}
    spec = SPEC | {"defenses": [{"defense": str(file), "name": "own"}]}
    rb.run_audit(spec, tmp_path / "out", **behind)
    asked = box.rows
    write_defense(file, BitDepth(bits=2), {})
    with pytest.raises(InputError, match=r"own has other options or another file than when .* was written: choose"):
        rb.run_audit(spec, tmp_path / "out", **behind)
    write_defense(file, BitDepth(bits=7), {})
    for other in ((DATA["planted"][0].flip(0), DATA["planted"][1]), (DATA["planted"][0], DATA["planted"][1] + 1)):
        with pytest.raises(InputError, match="spy is attacked on other images or labels"):
            rb.run_audit(spec, tmp_path / "out", models={"spy": box}, data={"planted": other})
    rb.run_audit(spec, tmp_path / "out", **behind)
    assert box.rows == asked


def test_what_changed_is_looked_at_again(tmp_path: Path) -> None:
    box = HalfSpace()

    def look(**options: Any) -> tuple[int, int]:
        """How many looks there are by now, and natural images that were refused."""
        gate = {"defense": "blacklight", "options": {"width": 1, "salt": "none", **options}}
        document = audit(tmp_path, {"spy": box}, defenses=[gate], attacks=["random"])
        written = json.loads((tmp_path / "out" / "benign" / "spy.blacklight.json").read_text())
        assert written["defense"][0]["options"]["threshold"] == options["threshold"]
        assert written["refused"] == document["systems"][0]["benign"]["refused"]
        looks = [json.loads(path.read_text()) for path in tmp_path.glob("out/preflight/spy.blacklight.????????.json")]
        asked = json.loads((tmp_path / "out" / "preflight" / "spy.blacklight.rows.json").read_text())
        assert asked == {"verify": sum(seen["rows"]["verify"] for seen in looks)}  # of all of them
        return len(looks), written["refused"]

    assert look(threshold=50) == (1, 0)
    assert look(threshold=1) == (2, 7)  # all but the first: windows of one value are in every image
    assert look(threshold=50) == (2, 0)


def test_what_a_threshold_could_not_measure_does_not_hold(tmp_path: Path) -> None:
    def verdicts(models: dict[str, Any], metric: str, **changes: Any) -> dict[str, bool]:
        both = [{"model": name, "data": "planted"} for name in models]
        bound = [{"metric": metric, "min": 0.0}]
        document = audit(tmp_path, models, metric + "".join(changes), models=both, thresholds=bound, **changes)
        return {verdict["where"].partition(",")[0]: verdict["holds"] for verdict in document["verdicts"]}

    class Labels(HalfSpace):
        scores = "none"

        def answer(self, rows: torch.Tensor, accounts: torch.Tensor) -> Answer:
            return Answer.of(super().answer(rows, accounts).labels)

    models = {"spy": HalfSpace(), "labels": Labels()}
    assert verdicts(models, "robust-accuracy", attacks=["square"]) == {"spy": True, "labels": False}
    assert verdicts(models, "robust-accuracy") == {"spy": True, "labels": True}  # by the attack that could be run
    gates = {"spy": HalfSpace(), "dead": Failing(0, lambda answer: 1 / 0)}  # type: ignore[arg-type, return-value]
    assert verdicts(gates, "false-positives", defenses=["blacklight"]) == {"spy": True, "dead": False}


def test_a_defense_that_cannot_be_put_on_a_model_is_no_end_of_the_audit(tmp_path: Path) -> None:
    document = audit(tmp_path, defenses=["none", "random-features"])
    assert {cell["defense"] for cell in document["excluded"]} == {"random-features"}
    assert [system["preflight"]["error"] is None for system in document["systems"]] == [True, False]
    assert {cell["status"] for cell in document["cells"]} == {"done"}


@pytest.mark.parametrize(
    ("attack", "adapts"), [("rehearsed:random", True), ("oars:hop-skip-jump", True), ("blinded:random", False)]
)
def test_oars_and_rehearsals_adapt_to_gates(attack: str, adapts: bool, tmp_path: Path) -> None:
    threat = {"norm": "l2", "epsilon": 0.5, "accounts": "any"}
    document = audit(tmp_path, defenses=["blacklight"], attacks=[attack], threats=[threat])
    assert document["rows"][0]["adaptive"] is adapts
    codes = {flag["code"] for flag in document["systems"][0]["flags"]}
    assert ("no-adaptive-attack" in codes) is not adapts


def test_another_executor_gives_the_same_audit(tmp_path: Path) -> None:
    ran: list[str] = []

    def backwards(cells: Sequence[Cell], work: Work, world: World) -> Iterator[Outcome]:
        for cell in reversed(cells):
            ran.append(cell.attack)
            yield work(cell)

    document = rb.run_audit(
        SPEC, tmp_path / "back", models={"spy": HalfSpace()}, data=DATA, executor=backwards
    ).document
    assert ran == ["square", "random"]
    assert timeless(document) == timeless(audit(tmp_path))


def test_an_image_is_broken_if_any_attack_breaks_it(tmp_path: Path) -> None:
    document = audit(tmp_path, threats=[{"norm": "linf", "epsilon": 0.5}])
    runs = [json.loads((tmp_path / "out" / cell["folder"] / "results.json").read_text()) for cell in document["cells"]]
    broken = [{image["index"] for image in run["images"] if image["success"]} for run in runs]
    (row,) = document["rows"]
    assert row["robust_accuracy"]["hits"] == 4 - len(broken[0] | broken[1])
    assert row["pairs"][0]["first_better"] == len(broken[0] - broken[1])
    assert row["pairs"][0]["second_better"] == len(broken[1] - broken[0])
    assert row["pairs"][0]["test"] == "mcnemar"
    assert row["best_attack"] == "square"
    near = audit(tmp_path, name="near", threats=[{"norm": "linf", "epsilon": 0.01}])
    assert [r["best_attack"] for r in near["rows"]] == [None]
    free = audit(tmp_path, name="free", threats=["linf"], attacks=["random"])
    assert free["rows"][0]["pairs"] == []
    assert free["cells"][0]["epsilon"] is None


def test_a_gate_has_its_false_positives_beside_it(tmp_path: Path) -> None:
    document = audit(
        tmp_path, defenses=["none", "blacklight"], threats=[{"norm": "linf", "epsilon": 0.3, "accounts": "any"}]
    )
    (file,) = (tmp_path / "out" / "benign").iterdir()
    written = json.loads(file.read_text())
    assert {key: written[key] for key in ("schema", "model", "confidence", "of")} == {
        "schema": 1,
        "model": "spy",
        "confidence": 0.95,
        "of": 8,  # the images that are not attacked
    }
    assert [recipe["name"] for recipe in written["defense"]] == ["blacklight"]
    assert document["systems"][0]["benign"] is None
    assert document["systems"][1]["benign"]["refused"] == written["refused"]
    assert [row["detection_misses"] is None for row in document["rows"]] == [True, False]
    assert [row["adaptive"] for row in document["rows"]] == [True, False]
    assert "no-adaptive-attack" in {flag["code"] for flag in document["systems"][1]["flags"]}


def test_what_a_silent_gate_notices_is_counted(tmp_path: Path) -> None:
    gate = {"defense": "blacklight", "options": {"action": "silent"}}
    document = audit(tmp_path, defenses=[gate], attacks=["square"], threats=[{"norm": "linf", "epsilon": 0.5}])
    run = json.loads((tmp_path / "out" / document["cells"][0]["folder"] / "results.json").read_text())
    noticed = [image["hits"] > 0 for image in run["images"]]
    assert run["summary"]["rejected"] == 0
    assert sum(noticed) > 0
    assert document["cells"][0]["undetected"]["hits"] == len(noticed) - sum(noticed)
    missed = [image["success"] and not seen for image, seen in zip(run["images"], noticed, strict=True)]
    assert document["rows"][0]["detection_misses"]["hits"] == sum(missed)
    for image in run["images"]:
        assert (image["first_hit"] > 0) == (image["hits"] > 0)
        assert image["hits"] <= image["queries"]


def test_ci_servers_get_what_they_know(tmp_path: Path) -> None:
    models = {"spy": HalfSpace(), "dead": Failing(0, lambda answer: 1 / 0)}  # type: ignore[arg-type, return-value]
    audit(
        tmp_path,
        models,
        models=[{"model": name, "data": "planted"} for name in models],
        attacks=["random", "cgba"],
        thresholds=[{"metric": "success", "max": 1.0}],
    )
    suites = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    counts = {s.get("name"): [s.get(key) for key in ("tests", "errors", "failures", "skipped")] for s in suites}
    assert counts == {"cells": ["4", "1", "0", "2"], "thresholds": ["2", "0", "1", "0"]}
    assert "was not measured" in str(suites.find(".//failure").get("message"))  # type: ignore[union-attr]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 2 thresholds missed" in page
    assert "https://" not in page.replace("https://www.w3.org", "")


# The file and the command line


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attack": ["cgba"]}, "unknown field of the audit 'attack': did you mean attacks"),
        ({"attacks": ["cgbaa"]}, "unknown attack 'cgbaa'"),
        ({"attacks": [{"attack": "square", "options": {"pp": 1}}]}, "unknown option of attack square 'pp'"),
        ({"defenses": [{"defense": "input-noise", "options": {"sigma": -1}}]}, "sigma of input-noise"),
        ({"attacks": ["random", "random"]}, "'random' is given twice"),
        ({"attacks": [{"attack": "random", "eot": "five"}]}, "eot of number 1 of attacks must be a whole number"),
        ({"attacks": []}, "names no attacks"),
        ({"threats": ["l3"]}, "one of l0, l2, linf"),
        ({"thresholds": [{"metric": "success"}]}, "either min or max"),
        ({"thresholds": [{"metric": "success", "max": 1, "defenses": "blacklite*"}]}, "defenses pattern .*blacklite"),
        ({"thresholds": [{"metric": "success", "max": 1, "budgets": [31]}]}, "no budget is 31"),
        ({"budgets": [0]}, "at least 1"),
        ({"models": ["spyy"]}, "spyy comes with no images|unknown model 'spyy'"),
        ({"attacks": ["cgba"]}, "no attack of this audit can be run: .*cgba works in l2"),
        ({"models": [{"model": "digits-cnn", "data": "planted"}]}, "the model takes 1 x 8 x 8"),
        (
            {"attacks": ["random", {"attack": "square", "knowledge": "scores", "name": "sq"}]},
            "^attack sq: unknown knowledge level 'scores': use label",
        ),
        ({"threats": ["linf", {"norm": "linf", "knowledge": "lable"}]}, "^threat linf-lable: unknown knowledge level"),
        ({"threats": ["linf", {"epsilon": -1}]}, "^threat l2--1: epsilon must be a positive number"),
        ({"threats": ["linf", {"epsilon": float("inf")}]}, "^threat l2-inf: epsilon must be a positive number"),
        ({"threats": ["linf", {"levels": 1}]}, "^threat l2-1-levels: levels must be a whole number of grey levels"),
        (
            {"threats": ["linf", {"name": "fine", "epsilon": 0.06, "levels": 16}]},
            "^threat fine: epsilon=0.06 is less than",
        ),
        (
            {
                "models": [{"model": "spy", "data": "planted", "levels": 16}],
                "threats": [{"norm": "linf", "epsilon": 0.06}],
            },
            "epsilon=0.06 is less than one of 16 grey levels",
        ),
        ({"threats": ["linf", {"name": "few", "levels": 0}]}, "^threat few: levels must be a whole number of grey"),
        ({"threats": ["linf", {"targets": -1}]}, "^threat l2-to--1: a target must be a whole number of at least 0"),
        ({"threats": ["linf", {"accounts": 0}]}, "^threat l2: accounts must be a whole number of at least 1, not 0"),
        ({"threats": [{"norm": "linf", "eot": -1}]}, "^threat linf: eot must be a whole number of at least 1, not -1"),
        ({"attacks": ["random", {"attack": "square", "eot": 0}]}, "^attack square: eot must be a whole number of at"),
        ({"attacks": ["random", {"attack": "square", "accounts": 0}]}, "^attack square: accounts must be a whole"),
        ({"models": [{"model": "spy", "data": "planted", "images": 0}]}, "^model spy: images must be a whole number"),
        ({"models": [{"model": "spy", "data": "planted", "levels": 0}]}, "^model spy: levels must be a whole number"),
        ({"images": 0}, "^images must be a whole number of at least 1, not 0"),
        ({"images": -1}, "^images must be a whole number of at least 1, not -1"),
        ({"max_rows": 0}, "^max_rows must be a whole number of at least 1, not 0"),
        ({"preflight": {"images": 0}}, "^preflight: images must be a whole number of at least 1, not 0"),
        ({"preflight": {"copies": -5}}, "^preflight: copies must be a whole number of at least 0, not -5"),
        ({"preflight": {"benign": -1}}, "^preflight: benign must be a whole number of at least 0, not -1"),
        ({"price_per_1000": -1}, "^price_per_1000 must be a number of at least 0, not -1"),
        ({"models": [{"model": "spy", "data": "planted", "price_per_1000": -1}]}, "^model spy: price_per_1000 must be"),
        ({"models": [{"model": "spy", "data": "planted", "rows_per_second": 0}]}, "^model spy: rows_per_second must"),
        *(
            (
                {"thresholds": [{"metric": metric, "min": bound}]},
                f"^threshold {metric} .*: min must be a share from 0 to 1",
            )
            for metric in ("clean-accuracy", "robust-accuracy", "success", "detection-misses", "certified-accuracy")
            for bound in (80, -0.1)
        ),
        ({"thresholds": [{"metric": "false-positives", "max": 1.01}]}, "max must be a share from 0 to 1, not 1.01"),
        ({"thresholds": [{"metric": "median-queries", "min": -1}]}, "min must be a number of at least 0, not -1"),
        ({"thresholds": [{"metric": "success", "max": 1, "radius": -1}]}, "a radius must be a number of at least 0"),
        ({"certify": [{"sigma": -0.25}]}, "^certify at -0.25: sigma must be a positive number"),
        ({"certify": [{"alpha": 3}]}, "^certify: alpha must lie between 0 and 0.5"),
        ({"certify": [{"sigma": 0.25, "n0": 0}]}, "^certify at 0.25: n0 must be a whole number of at least 1"),
        ({"certify": [{"sigma": 0.25, "radii": [-1]}]}, "^certify at 0.25: a radius must be a number of at least 0"),
        ({"certify": {"sigma": 0.25}}, "^certify must be a list"),
    ],
)
def test_bad_input_is_one_line_before_a_query(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    box = HalfSpace()
    with pytest.raises(InputError, match=complaint):
        audit(tmp_path, {"spy": box}, **changes)
    assert box.rows == 0
    assert not (tmp_path / "out").exists()


def test_numbers_of_zero_that_mean_something_are_taken(tmp_path: Path) -> None:
    bounds = [{"metric": "success", "min": 0}, {"metric": "median-distance", "max": 1000}]
    none = {"images": 4, "copies": 0, "benign": 0}
    document = audit(tmp_path, preflight=none, thresholds=bounds, price_per_1000=0, defenses=["blacklight"])
    seen = document["systems"][0]
    assert (seen["preflight"]["copies"]["sent"], seen["benign"], document["worst_case"]["price"]) == (1, None, 0)


def test_two_audits_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        Audit(load(SPEC), tmp_path, World({"spy": HalfSpace()}, DATA)),
        pytest.raises(InputError, match="another audit is running"),
        Audit(load(SPEC), tmp_path, World({"spy": HalfSpace()}, DATA)),
    ):
        pass


def test_runs_and_audits_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "digits-cnn", "--attack", "square", "--images", "2", "--epsilon", "0.8", "--budget", "20"]
    words += ["--quiet", "--fresh", "--out"]
    few = [written(tmp_path, attacks=["square"], budgets=[20]), "--quiet", "--out"]
    for own, other, kind in ((main, attack, "an audit"), (attack, main, "a run")):
        folder = tmp_path / kind
        arguments = {main: few, attack: words}
        assert own([*arguments[own], str(folder)]) == 0
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert other([*arguments[other], str(folder)]) == 2
        assert f"holds {kind}: choose another one" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def written(tmp_path: Path, **changes: Any) -> str:
    """A small audit of a real model as a file."""
    spec = {"images": 6, "budgets": [60], "models": ["digits-cnn"], "attacks": ["cgba", "hop-skip-jump", "square"]}
    spec |= {"threats": [{"norm": "l2", "epsilon": 0.8}], "preflight": {"images": 4, "copies": 4}}
    path = tmp_path / "audit.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return str(path)


def test_exit_codes_say_whether_thresholds_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine, missed = (
        {"metric": "clean-accuracy", "min": 0.1},
        {"metric": "clean-accuracy", "min": 0.99, "confident": True},
    )
    few = {"attacks": ["square"], "price_per_1000": 2.0, "currency": "EUR"}
    out = str(tmp_path / "out")
    assert main([written(tmp_path, **few, thresholds=[fine]), "--dry-run", "--out", out]) == 0
    shown = capsys.readouterr().out
    look = 8 * 4 + 1 + 4 + (360 - 6)  # 4 images, 4 copies, and the digits that are not attacked
    assert f"at most {372 + look} rows" in shown
    assert f"at most {(372 + look) / 500:.2f} EUR" in shown
    assert not Path(out).exists()
    assert main([written(tmp_path, **few, thresholds=[fine]), "--out", out]) == 0
    assert main([written(tmp_path, **few, thresholds=[fine, missed]), "--out", out]) == 1
    assert "MISSED: clean-accuracy is 1 (95 % interval 0.6097 to 1), must be at least 0.99" in capsys.readouterr().out
    assert main([str(tmp_path / "none.yaml"), "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_dry_run_refuses_the_folders_that_the_audit_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate, done, run, file = (tmp_path / name for name in ("own.safetensors", "done", "run", "file"))
    write_defense(gate, BitDepth(bits=7), {})
    words = [written(tmp_path, attacks=["square"], budgets=[20], defenses=[{"defense": str(gate), "name": "own"}])]
    assert main([*words, "--quiet", "--out", str(done)]) == 0
    assert main([*words, "--dry-run", "--out", str(done)]) == 0
    run.mkdir()
    (run / "config.yaml").touch()
    file.touch()
    write_defense(gate, BitDepth(bits=2), {})  # what stands in `done` is about another defense now
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder, says in (
        (file, "cannot be written to"),
        (file / "below", "cannot be written to"),
        (run, "holds a run: choose another one"),
        (done, "own has other options or another file than when"),
    ):
        for dry in (["--dry-run"], []):
            capsys.readouterr()
            assert main([*words, *dry, "--out", str(folder)]) == 2
            error = capsys.readouterr().err
            assert says in error
            assert error.count("\n") == 1
    with Audit(load(words[0]), tmp_path / "busy", World()):
        assert main([*words, "--dry-run", "--out", str(tmp_path / "busy")]) == 2
    assert "another audit is running" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("words", [[], ["audit.yaml", "--speed", "9"]])
def test_words_that_make_no_sense_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_infinite_median_was_measured(tmp_path: Path) -> None:
    document = audit(
        tmp_path,
        attacks=["random"],
        threats=[{"norm": "linf", "epsilon": 0.001}],
        thresholds=[{"metric": "median-distance", "max": 5}],
    )
    (verdict,) = document["verdicts"]
    assert (verdict["measured"], verdict["value"], verdict["holds"]) == (True, None, False)
    assert complaint(verdict) == "median-distance is infinite, must be at most 5"


def test_certificates_are_counted_and_bounded(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"attacks": ["square"], "defenses": ["none", "input-noise"]}
    spec["certify"] = [{"sigma": 0.1, "n0": 10, "n": 100, "radii": [0, 0.1], "defenses": "none"}]
    at = {"metric": "certified-accuracy", "radius": 0.05}  # none of those that it sums up
    spec["thresholds"] = [{**at, "min": 0.1, "defenses": "none"}, {**at, "min": 0.1, "name": "both"}]
    assert main([written(tmp_path, **spec), "--out", str(tmp_path / "out")]) == 1
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["worst_case"]["rows"]["certify"] == 6 * 110
    seen, cells = (
        [sum(each["rows"].values()) for each in its]
        for its in ([system["preflight"] for system in document["systems"]], document["cells"])
    )
    assert document["rows_asked"] == sum(seen) + sum(cells) + 6 * 110
    smooth, noisy = (system["certified"] for system in document["systems"])
    assert noisy is None
    assert smooth["0.1"]["of"] == 6
    assert [(v["threshold"], v["holds"]) for v in document["verdicts"]][1:] == [
        ("both", smooth["0.1"]["share"] >= 0.1),
        ("both", False),
    ]
    before = timeless(document)
    assert main([written(tmp_path, **spec), "--out", str(tmp_path / "out")]) == 1
    assert timeless(json.loads((tmp_path / "out" / "audit.json").read_text())) == before


def test_rows_of_certificates_that_failed_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [0], Oracle.ask

    def failing(self: Oracle, rows: torch.Tensor, *rest: Any) -> Answer:
        asked[0] += len(rows)
        answer = real(self, rows, *rest)
        if self.ledger["certify"] > 20:
            raise ModelError("the service is down")
        return answer

    monkeypatch.setattr(Oracle, "ask", failing)
    spec: dict[str, Any] = {"attacks": ["square"], "certify": [{"sigma": 0.1, "n0": 10, "n": 20}]}
    assert main([written(tmp_path, **spec), "--quiet", "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["systems"][0]["certified"] is None
    assert document["rows_asked"] == asked[0]


def test_a_smoothed_model_is_certified_as_it_is(tmp_path: Path) -> None:
    smoothing = {"defense": ["smoothing", "bit-depth"], "name": "s"}
    chain: dict[str, Any] = {"attacks": ["square"], "defenses": [smoothing], "certify": [{"n0": 10, "n": 50}]}
    alone = {**chain, "defenses": [{"defense": "smoothing", "options": {"sigma": 0.1, "n": 4, "alpha": None}}]}
    configs = []
    for name, spec in (("chain", chain), ("alone", alone)):
        audit = Audit(load(written(tmp_path, **spec)), tmp_path / name, World())
        (certification,) = audit.certifications
        configs.append(certification.config)
    assert [(c.defense, c.sigma, c.n) for c in configs] == [(["bit-depth"], 0.25, 50), (None, 0.1, 50)]
    for wrong, says in (({"sigma": 0.3}, "leave sigma out"), ({"defenses": "none"}, "by which sigma")):
        spec = {**alone, "defenses": ["none", *alone["defenses"]], "certify": [{"defenses": "smoothing", **wrong}]}
        with pytest.raises(InputError, match=says):
            Audit(load(written(tmp_path, **spec)), tmp_path / says, World())


def test_a_defended_model_is_made_ready_once_for_looks_and_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def noting(system: System, *rest: Any) -> Subject:
        made.append(system.id)
        return subject_of(system, *rest)

    for module in ("run", "certificates"):
        monkeypatch.setattr(f"robustbox.auditing.{module}.subject_of", noting, raising=False)
    spec: dict[str, Any] = {"attacks": ["square"], "certify": [{"sigma": 0.1, "n0": 5, "n": 20}]}
    audit = Audit(load(written(tmp_path, **spec)), tmp_path / "out", World())
    audit.estimate()
    assert len(audit.certifications) == len(audit.plan.systems) == len(made) == len(set(made))


@pytest.mark.parametrize(
    ("defense", "entry"),
    [
        ("blacklight", {"sigma": 0.1}),
        (["input-noise", "blacklight"], {"sigma": 0.1}),
        (["smoothing", "blacklight"], {}),
    ],
)
def test_what_remembers_queries_is_not_certified_and_asked_nothing(
    defense: Any,
    entry: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Oracle, "ask", lambda self, rows, *_: asked.append(len(rows)))
    spec = {"defenses": ["none", {"defense": defense, "name": "gate"}], "certify": [{**entry, "defenses": "gate"}]}
    out = tmp_path / "out"
    for dry in (["--dry-run"], []):
        assert main([written(tmp_path, **spec), *dry, "--quiet", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert "digits-cnn.gate cannot be certified" in error
        assert "depends on what was asked before" in error
        assert error.count("\n") == 1
    assert (asked, out.exists()) == ([], False)


def test_a_defense_that_cannot_be_put_on_a_model_is_not_certified_and_the_rest_is(tmp_path: Path) -> None:
    spec = {"defenses": ["none", "zo-ae-ds"], "attacks": ["square"], "certify": [{"sigma": 0.1, "n0": 5, "n": 20}]}
    document = rb.run_audit(written(tmp_path, **spec), tmp_path / "out").document
    assert [system["certified"] is None for system in document["systems"]] == [False, True]


def test_after_an_interrupt_the_report_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(cell: Cell, world: World, watch: object = None) -> Outcome:
        if cell.attack == "square":
            raise KeyboardInterrupt
        return run_cell(cell, world)

    monkeypatch.setattr("robustbox.auditing.run.run_cell", interrupted)
    assert main([written(tmp_path, attacks=["cgba", "square"]), "--quiet", "--out", str(tmp_path / "out")]) == 130
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert {cell["attack"]: cell["status"] for cell in document["cells"]} == {"cgba": "done", "square": "not-run"}
    assert document["rows"][0]["complete"] is False


def test_an_audit_that_was_killed_goes_on_to_the_same_report(tmp_path: Path, root: Path) -> None:
    path = written(tmp_path, budgets=[200], defenses=["none", "input-noise"])
    command = [sys.executable, "-m", "robustbox.audit", path, "--quiet", "--out"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    broken = tmp_path / "broken"
    with subprocess.Popen([*command, broken], cwd=root, env=environment) as process:
        while len(list(broken.glob("cells/*/results.json"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = {cell.parent.name for cell in broken.glob("cells/*/results.json")}
    assert 2 <= len(done) < 6
    before = {name: (broken / "cells" / name / "results.json").stat().st_mtime_ns for name in done}
    assert main([path, "--quiet", "--out", str(broken)]) == 0
    assert main([path, "--quiet", "--out", str(tmp_path / "whole")]) == 0
    assert {name: (broken / "cells" / name / "results.json").stat().st_mtime_ns for name in done} == before
    one, two = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("broken", "whole"))
    again = sum(journal(cell)["in_flight"] for cell in broken.glob("cells/*"))  # sent twice, as it was killed
    assert one.pop("rows_asked") == two.pop("rows_asked") + again
    assert timeless(one) == timeless(two)


def journal(cell: Path) -> dict[str, int]:
    """What a cell's results say of its journal."""
    return dict(json.loads((cell / "results.json").read_text())["journal"])


@pytest.mark.parametrize(
    ("name", "systems", "cells"), [("quick", 6, 24), ("leaderboard", 13, 77), ("bayes-subspace", 1, 5)]
)
def test_the_audits_that_come_along_can_be_planned(
    name: str, systems: int, cells: int, root: Path, tmp_path: Path
) -> None:
    plan = Audit(load(root / "configs" / f"{name}.yaml"), tmp_path, World()).plan
    assert (len(plan.systems), len(plan.cells), plan.excluded) == (systems, cells, [])
