"""The example packages of the documentation, installed by pip beside robustbox: listed, audited, on the leaderboard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = """
name: example
images: 6
budgets: [120]
models: [{model: nearest-mean, data: odd-digits}]
defenses: [none, two-views]
attacks: [straight-lines, {attack: cgba, defenses: none}]
threats: [{norm: l2, epsilon: 1.5}]
preflight: {benign: 10}
"""
COMMANDS = """
import sys
from robustbox.attack import main as attack
from robustbox.audit import main as audit
from robustbox.leaderboard.__main__ import main as leaderboard
attack(["--list"])
for code in (
    attack(["--attack", "straight-lines", "--attack.steps", "4", "--model", "digits-cnn", "--images", "3", "--budget", "60"]),
    audit(["audit.yaml", "--out", "audit", "--quiet"]),
    leaderboard(["audit", "--out", "site"]),
    leaderboard(["--verify", "site/entries/NearestMean+two-views.json", "--runs", "audit"]),
):
    if code:
        sys.exit(f"exit code {code}")
"""


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules into which pip installed the three packages."""
    sources, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("modules")
    packages = []
    for kind in ("attack", "defense", "model"):
        packages.append(str(shutil.copytree(root / "docs" / "examples" / f"{kind}-package", sources / kind)))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, *packages], check=True, capture_output=True)
    return target


def test_a_third_partys_packages_need_no_change_in_robustbox(installed: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "audit.yaml").write_text(AUDIT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(root)]), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("straight-lines", "two-views", "nearest-mean", "odd-digits"):
        assert f" {name} " in done.stdout
    cells = json.loads((tmp_path / "audit" / "audit.json").read_text())["cells"]
    assert sorted((cell["defense"], cell["attack"]) for cell in cells) == [
        ("none", "cgba"),
        ("none", "straight-lines"),
        ("two-views", "straight-lines"),
    ]
    defended = json.loads((tmp_path / "site" / "entries" / "NearestMean+two-views.json").read_text())
    assert defended["cost"]["passes_per_query"] == 2
    (threat,) = defended["threats"]
    (attack,) = threat["attacks"]
    assert attack["attack"] == {"name": "straight-lines", "options": {"steps": 8}}
    assert attack["queries"] > 0
    assert "straight-lines" in (tmp_path / "site" / "index.html").read_text()
    assert "NearestMean+two-views: everything is as the entry says" in done.stdout
