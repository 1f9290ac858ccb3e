"""A run that is made to be killed: a service that writes down each row that it answers, before it answers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustbox import certify, run_audit
from robustbox.api import run_attack
from robustbox.protocol import Answer, BlackBox
from robustbox.results import AttackResult
from tests.toys import images


class Service(BlackBox):
    """Class 1 where the mean exceeds 0.6; its own count of rows is the size of a file, a byte a row.

    It goes away for good rather than answer more than `dies_at` rows, and takes the process that asks with it, unanswered, once
    it has seen `kills_at`.
    """

    name, classes, scores = "service", 2, "logit"

    def __init__(self, log: Path, pause: float = 0.0, dies_at: int | None = None, kills_at: int | None = None) -> None:
        self.log, self.pause, self.dies_at, self.kills_at = log, pause, dies_at, kills_at

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        counted = self.log.stat().st_size if self.log.exists() else 0
        if self.dies_at is not None and counted + len(rows) > self.dies_at:
            raise ConnectionError("the service went away")
        with self.log.open("ab", buffering=0) as file:
            os.write(file.fileno(), b"." * len(rows))
        if self.kills_at is not None and counted + len(rows) >= self.kills_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        margin = torch.stack([row.double().mean() for row in rows]) - 0.6
        return Answer.of((margin > 0).long(), torch.stack([-margin, margin], dim=1).float())


def attack(folder: str, log: str, pause: float = 0.0, dies_at: int | None = None) -> AttackResult:
    """The run: CGBA on four images behind a gate, 100 queries each."""
    torch.set_num_threads(1)
    box = Service(Path(log), pause, dies_at)
    return run_attack(
        box, images(4), [0] * 4, "cgba", budget=100, defense="blacklight", accounts=None, max_rows=8, out=folder
    )


def certified(folder: str, log: str, kills_at: int | None = None) -> dict[str, Any]:
    """What `certified.json` holds of three digits, 5 and 20 draws each, in passes of 8 rows."""
    torch.set_num_threads(1)
    box = Service(Path(log), kills_at=kills_at)
    box.classes = 10
    certify.as_black_box = lambda *_: box  # type: ignore[attr-defined]
    config = certify.CertifyConfig(data="digits", images=3, n0=5, n=20, batch=8, out=folder, quiet=True)
    return certify.run(config)


def audited(folder: str, log: str, kills_at: int | None = None, budget: int = 5) -> dict[str, Any]:
    """What `audit.json` holds of a service that is wrong about three of four images, and so is asked them in other ways too."""
    torch.set_num_threads(1)
    spec = {
        "models": [{"model": "service", "data": "planted"}],
        "attacks": ["random"],
        "threats": ["linf"],
        "budgets": [budget],
        "preflight": {"images": 4, "copies": 5},
    }
    planted = images(4), torch.tensor([0, 1, 1, 1])
    box = Service(Path(log), kills_at=kills_at)
    return run_audit(spec, folder, models={"service": box}, data={"planted": planted}).document
