"""Rows stand in a count although the process that asked them was killed before it heard an answer."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.victim import audited, certified

Work = Callable[[str, str, int | None], dict[str, Any]]


def killed(work: Work, tmp_path: Path, moments: Iterable[int]) -> tuple[dict[str, Any], int]:
    """What some work says in the end, and the rows that its service saw, when it is killed that many rows after each start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.victim"])
    folder, log = str(tmp_path / "out"), tmp_path / "log"
    for rows in moments:
        seen = log.stat().st_size if log.exists() else 0
        victim = context.Process(target=work, args=(folder, str(log), seen + rows))
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    return work(folder, str(log), None), log.stat().st_size


def test_rows_of_certificates_that_were_killed_are_counted(tmp_path: Path) -> None:
    moments = (1, 6, 25, 26)  # in the guess, in the draws, in their last pass, in the guess of the next image
    document, seen = killed(certified, tmp_path, moments)
    assert document["summary"]["ledger"] == {"certify": seen}
    assert seen > 3 * 25
    assert int((tmp_path / "out" / "rows.txt").read_text()) == seen


def test_rows_of_looks_that_were_killed_are_counted(tmp_path: Path) -> None:
    moments = (1, 9, 17, 33)  # in both rounds, with images prepared otherwise, among the copies
    document, seen = killed(audited, tmp_path, moments)
    assert document["rows_asked"] == seen
    assert seen > sum(moments)
    assert document["systems"][0]["preflight"]["rows"] == {"verify": 38}
    assert audited(str(tmp_path / "out"), str(tmp_path / "log"))["rows_asked"] == seen


def test_rows_of_cells_that_were_killed_are_counted(tmp_path: Path) -> None:
    """After a look of 38 rows: in the clean check, whose rows no journal has then, and twice in the attack, which goes on."""
    moments = (40, 12, 11)
    work = partial(audited, budget=60)
    document, seen = killed(work, tmp_path, moments)
    assert document["rows_asked"] == seen
    (cell,) = document["cells"]
    assert cell["status"] == "done"
    assert seen > 38 + sum(cell["rows"].values())
