"""A client that is killed while the service answers it, and started again: both sides count the same rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch

import robustbox as rb
from robustbox.defenses.blacklight import Blacklight
from robustbox.folder import read_run
from robustbox.protocol import Answer
from tests.services import served
from tests.toys import HalfSpace, images

N, BUDGET = 2, 60
CLIENT = """
import sys, robustbox as rb
from tests.toys import images
rb.run_attack(sys.argv[1], images({n}, (3, 16, 16)), [0] * {n}, "hop-skip-jump", budget={budget}, max_rows=16, out=sys.argv[2])
"""


class Trap(HalfSpace):
    """A half-space that stops in the middle of an answer once it has seen so many rows, until it is let go."""

    def __init__(self, *traps: int) -> None:
        super().__init__()
        self.traps = list(traps)
        self.caught, self.released = threading.Event(), threading.Event()

    def of(self, rows: torch.Tensor) -> Answer:
        if self.traps and self.rows >= self.traps[0]:
            del self.traps[0]
            self.caught.set()
            self.released.wait(60)
            self.released.clear()
        return super().of(rows)


def client(address: str, folder: Path, root: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CLIENT.format(n=N, budget=BUDGET), address, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)


def undisturbed() -> rb.AttackResult:
    gate = Blacklight().wrap(HalfSpace(), 0)
    return rb.run_attack(gate, images(N, (3, 16, 16)), [0] * N, "hop-skip-jump", budget=BUDGET, max_rows=16)


def test_a_killed_client_goes_on_and_both_sides_count_the_same(tmp_path: Path, root: Path) -> None:
    """Killed twice, each time with a pass in flight that the service answers to nobody, behind a gate that remembers it.

    The pass is asked again under the key that it had: it is neither judged nor bought a second time.
    """
    trap = Trap(20, 60)
    with served(Blacklight().wrap(trap, 0)) as (address, service):
        for _ in range(2):
            running = client(address, tmp_path / "run", root)
            assert trap.caught.wait(60)
            trap.caught.clear()
            running.send_signal(signal.SIGKILL)
            running.wait()
            trap.released.set()
        last = client(address, tmp_path / "run", root)
        assert last.wait(120) == 0, last.stderr.read() if last.stderr else ""
    document, adversarials = read_run(tmp_path / "run")
    expected = undisturbed()
    ledger, told = document["summary"]["ledger"], document["model"]["traffic"]
    assert document["journal"]["sessions"] == 3
    assert service.replayed == document["journal"]["in_flight"] > 0
    assert sum(service.rows.values()) == sum(ledger.values()) == told["rows_answered"]
    assert told["rows_doubtful"] == 0
    assert expected.rejected.sum() > 0
    assert [image["rejected"] for image in document["images"]] == expected.rejected.tolist()
    assert ledger["attack"] == expected.ledger["attack"]
    assert [image["trace"] for image in document["images"]] == [[list(step) for step in t] for t in expected.traces]
    torch.testing.assert_close(adversarials, expected.adversarials, rtol=0, atol=0, equal_nan=True)
