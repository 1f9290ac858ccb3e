"""The package works from a checkout, from a wheel, and from a checkout beside a wheel; importing it is cheap."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

HEAVY = [
    "torchvision",
    "timm",
    "foolbox",
    "eagerpy",
    "sklearn",
    "scipy",
    "jsonargparse",
    "rich",
    "botorch",
    "jinja2",
]
PARTS = ["attacks", "defenses", "models"]
WHERE = """
import json, robustbox, robustbox.attacks, robustbox.defenses, robustbox.models, robustbox.registry as registry
parts = [robustbox, robustbox.attacks, robustbox.defenses, robustbox.models]
print(json.dumps({"files": [part.__file__ for part in parts], "attacks": registry.names("attacks")}))
"""


def python(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that stands in `cwd` and finds modules there and in `path` first."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("checkout") / "robustbox"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(root, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout, built with the tools of this environment."""
    built = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", built]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, checkout], check=True, capture_output=True)
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules that holds the wheel."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_importing_costs_no_heavy_library_but_torch(root: Path) -> None:
    loaded = python("import sys, torch, robustbox; print({name.partition('.')[0] for name in sys.modules})", root)
    assert loaded.returncode == 0, loaded.stderr
    assert "'robustbox'" in loaded.stdout
    assert [name for name in HEAVY if f"'{name}'" in loaded.stdout] == []


def test_every_public_name_exists() -> None:
    import robustbox

    assert all(callable(getattr(robustbox, name)) for name in robustbox.__all__)
    with pytest.raises(AttributeError, match="no attribute 'run_atack'"):
        _ = robustbox.run_atack


def test_checkout_works_uninstalled(checkout: Path) -> None:
    found = json.loads(python(WHERE, checkout).stdout)
    assert found["files"] == [str(checkout / part / "__init__.py") for part in ["robustbox", *PARTS]]
    assert "cgba" in found["attacks"]


def test_wheel_holds_one_package_with_its_data(wheel: Path, root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    about = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {"robustbox", about}
    assert {"robustbox/py.typed", "robustbox/attacks/cgba.py", "robustbox/attack.py"} <= set(names)
    data = [path for path in (root / "models").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert data, "the zoo has no weights"
    assert {f"robustbox/models/{path.relative_to(root / 'models').as_posix()}" for path in data} <= set(names)
    assert {f"robustbox/templates/{path.name}" for path in (root / "robustbox/templates").iterdir()} <= set(names)


def test_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    found = json.loads(python(WHERE, tmp_path, installed).stdout)
    package = installed / "robustbox"
    assert found["files"] == [str(folder / "__init__.py") for folder in (package, *(package / part for part in PARTS))]
    assert "cgba" in found["attacks"]
    for part in PARTS:  # a user's own folder of that name must not be shadowed
        assert "ModuleNotFoundError" in python(f"import {part}", tmp_path, installed).stderr


def test_checkout_comes_before_an_installed_wheel(installed: Path, checkout: Path) -> None:
    found = json.loads(python(WHERE, checkout, installed).stdout)
    assert found["files"] == [str(checkout / part / "__init__.py") for part in ["robustbox", *PARTS]]


def test_every_entry_point_exists(root: Path) -> None:
    from importlib.metadata import EntryPoint

    groups = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert {"robustbox.attacks", "robustbox.models", "robustbox.data"} <= set(groups)
    for group, entries in groups.items():
        for name, value in entries.items():
            assert callable(EntryPoint(name, value, group).load()), f"{group}: {name}"


def test_requirements_name_no_local_file(root: Path) -> None:
    text = (root / "pyproject.toml").read_text() + (root / "scripts" / "constraints.txt").read_text()
    assert not [word for word in ("file:", "://", " @ ", "--index", "--find-links") if word in text]
