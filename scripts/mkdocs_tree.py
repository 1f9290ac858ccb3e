"""What mkdocs cannot know by itself: the packages under the names that they install as, and pages that nobody put in the menu.

Reference pages are made here, one a package, of every public module: none can be forgotten.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "reference" / "robustbox"
PARTS = {
    "engine": "robustbox",
    "auditing": "robustbox.auditing",
    "leaderboard": "robustbox.leaderboard",
    "attacks": "robustbox.attacks",
    "defenses": "robustbox.defenses",
    "models": "robustbox.models",
}


def on_startup(command: str, dirty: bool) -> None:
    """Bring the four code folders together as one package: before any plug-in looks where the code is."""
    shutil.rmtree(TREE, ignore_errors=True)
    for package in PARTS.values():  # copies: the reader of docstrings takes a link for what it points to
        name = package.removeprefix("robustbox").removeprefix(".")
        source = next(folder for folder in (ROOT / "robustbox" / name, ROOT / name) if folder.is_dir())
        (TREE / name).mkdir(parents=True, exist_ok=True)
        for path in source.glob("*.py"):
            shutil.copyfile(path, TREE / name / path.name)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the menu."""
    nav: list[Any] = config.nav or []
    known = str(nav)
    pages = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if f"'{path.name}'" not in known)
    if pages:
        nav.append({"More": pages})
    nav.append({"Reference": [{part.capitalize(): f"reference/{part}.md"} for part in PARTS]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference."""
    for part, package in PARTS.items():
        files.append(File.generated(config, f"reference/{part}.md", content=reference(part, package)))
    return files


def reference(part: str, package: str) -> str:
    """A page of a package's modules."""
    folder = TREE.joinpath(*package.split(".")[1:])
    modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if part == "engine":  # what a newcomer needs comes first
        first = ["api", "protocol", "results", "statistics", "survival", "comparisons"]
        modules = first + [module for module in modules if module not in first]
    return f"# {part.capitalize()}\n\n" + "\n\n".join(f"::: {package}.{module}" for module in modules) + "\n"
