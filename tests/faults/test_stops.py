"""A run is stopped by what stops runs; the same command goes on, and the service's count and ours agree."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustbox.errors import InputError, ModelError, StorageError
from robustbox.folder import read_run
from tests.faults.victim import attack
from tests.schema import without_times

KILLS = 20


def outcome(folder: Path) -> tuple[Any, bytes]:
    """What a run found, without when and how fast, and in how many sessions."""
    document, adversarials = read_run(folder)
    return without_times(document), adversarials.numpy().tobytes()


@pytest.fixture
def whole(tmp_path: Path) -> tuple[tuple[Any, bytes], int]:
    """What the run finds that nothing disturbs, and the rows that its service answers."""
    attack(str(tmp_path / "whole"), str(tmp_path / "whole.log"))
    return outcome(tmp_path / "whole"), (tmp_path / "whole.log").stat().st_size


def test_killed_at_twenty_random_moments(tmp_path: Path, whole: tuple[Any, int]) -> None:
    """Twenty kills, in as many runs as it takes: one that comes to its end is looked at, and another begun."""
    expected, rows = whole
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.victim"])
    draws, killed, runs = np.random.default_rng(8), 0, 0
    while killed < KILLS:
        folder, log, here = tmp_path / f"run{runs}", tmp_path / f"run{runs}.log", 0
        runs += 1
        while killed < KILLS:
            victim = context.Process(target=attack, args=(str(folder), str(log), 0.01))
            victim.start()
            before = log.stat().st_size if log.exists() else 0
            limit = before + int(draws.integers(0, 2 * rows // KILLS))
            while victim.is_alive() and (log.stat().st_size if log.exists() else 0) <= limit:
                time.sleep(0.002)
            time.sleep(float(draws.uniform(0, 0.015)))
            victim.kill()
            victim.join()
            if victim.exitcode == 0:  # it came to its end
                break
            assert victim.exitcode == -signal.SIGKILL
            killed, here = killed + 1, here + 1
        if not (folder / "report.html").exists() or not read_run(folder)[0]["complete"]:
            attack(str(folder), str(log))
        assert outcome(folder) == expected
        seen, in_flight = log.stat().st_size, read_run(folder)[0]["journal"]["in_flight"]
        assert rows <= seen <= rows + in_flight  # what was in flight reached the service, or died on its way
        assert in_flight <= 8 * here  # a pass each
        with pytest.raises(InputError, match="holds a complete run"):
            attack(str(folder), str(log))
        assert log.stat().st_size == seen


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", place]).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(tmp_path: Path, small_disk: Path, whole: tuple[Any, int]) -> None:
    expected, rows = whole
    log = tmp_path / "run.log"
    for _ in range(2):  # twice: still full
        with pytest.raises(StorageError, match=r"cannot be written.*give the same command again") as told:
            attack(str(small_disk / "run"), str(log))
        assert "\n" not in str(told.value)
        assert log.stat().st_size < rows
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    attack(str(small_disk / "run"), str(log))
    assert outcome(small_disk / "run") == expected
    in_flight = read_run(small_disk / "run")[0]["journal"]["in_flight"]
    assert rows <= log.stat().st_size <= rows + in_flight


def test_a_read_only_folder(tmp_path: Path, small_disk: Path, whole: tuple[Any, int]) -> None:
    log = tmp_path / "run.log"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for out in (small_disk, small_disk / "run"):
        with pytest.raises(InputError, match="cannot be written to") as told:
            attack(str(out), str(log))
        assert "\n" not in str(told.value)
    assert not log.exists()


def test_a_clock_that_goes_backwards(tmp_path: Path, whole: tuple[Any, int], monkeypatch: pytest.MonkeyPatch) -> None:
    day = iter(range(10**9, 0, -86400))
    monkeypatch.setattr(time, "time", lambda: float(next(day)))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(day)))
    attack(str(tmp_path / "run"), str(tmp_path / "run.log"))
    document = read_run(tmp_path / "run")[0]
    assert document["seconds"].keys() == {"clean", "attack", "verify"}
    assert outcome(tmp_path / "run") == whole[0]


def test_a_run_goes_on_after_the_clock_was_set_back(
    tmp_path: Path, whole: tuple[Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal has readings of the clock: those of the second session come before those of the first."""
    expected, rows = whole
    folder, log = tmp_path / "run", tmp_path / "run.log"
    with pytest.raises(ModelError, match="the service went away"):
        attack(str(folder), str(log), dies_at=rows // 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: -1e9)
    attack(str(folder), str(log))
    assert outcome(folder) == expected
    document = read_run(folder)[0]
    assert all(seconds >= 0 for seconds in document["seconds"].values())
    assert document["journal"]["sessions"] == 2
    assert 0 < document["journal"]["in_flight"] <= 8
    assert log.stat().st_size == rows  # the pass that failed was not answered, nor counted by the service
