"""The documentation as a site, and the tutorial word for word: minutes of work, done where ROBUSTBOX_DOCS=1 asks for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leaderboard.browser import browsers, opened

pytestmark = pytest.mark.skipif(
    "ROBUSTBOX_DOCS" not in os.environ, reason="takes minutes: set ROBUSTBOX_DOCS=1, as .ci/run does"
)


def test_the_site_builds_without_a_warning_asks_no_network_and_is_searched_from_disk(
    root: Path, tmp_path: Path
) -> None:
    shutil.rmtree(root / "build" / "reference", ignore_errors=True)  # as in a checkout that never built it
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [tmp_path / f"{name}.html" for name in ("index", "tutorial", "extending", "reference/attacks")]
    for page in [*pages, tmp_path / "leaderboard" / "index.html"]:
        assert not re.findall(
            r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+stylesheet[^>]+href=\"(?:https?:)?//",
            page.read_text(),
        ), page.name
    assert "robustbox.attacks.cgba.CGBA" in pages[-1].read_text()
    for browser in browsers():
        with opened(browser, tmp_path / "leaderboard" / "index.html"):
            pass
        with opened(browser, pages[-1]) as shown:
            shown.keyboard.press("s")
            shown.keyboard.type("journal")
            assert "/journal.html" in str(shown.locator(".md-search-result__link").first.get_attribute("href"))


def test_the_tutorial_works_word_for_word(root: Path, tmp_path: Path) -> None:
    """In an empty folder every file that it shows is written, every command that it gives is run."""
    text = (root / "docs" / "tutorial.md").read_text()
    environment = {**os.environ, "PYTHONPATH": str(root)}
    said = []
    for language, attributes, content in re.findall(r"(?ms)^```(\w+)([^\n]*)\n(.*?)^```", text):
        if title := re.search(r'title="([^"]+)"', attributes):
            (tmp_path / title[1]).write_text(content)
            continue
        assert language == "sh"
        for line in content.splitlines():
            command = re.sub(r"^python ", f"{sys.executable} ", line)
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == (1 if "fails" in attributes else 0), f"{line}\n{done.stdout}\n{done.stderr}"
            said.append(done.stdout)
    assert len(said) == 6
    assert all(
        (tmp_path / page).is_file() for page in ("runs/first/report.html", "runs/audit/report.html", "site/index.html")
    )
    assert "everything is as the entry says" in said[-1]
