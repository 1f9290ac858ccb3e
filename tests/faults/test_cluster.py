"""Two workers give what one process gives; one that dies costs its own time and no row but those in flight."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from robustbox.auditing.run import run_audit
from robustbox.cluster import Cluster
from robustbox.errors import InputError
from robustbox.folder import read_run
from tests.schema import without_times
from tests.toys import images

AUDIT: dict[str, Any] = {
    "name": "shards",
    "images": 7,
    "budgets": [80],
    "models": [{"model": "toy", "data": "grey"}],
    "defenses": [
        "none",
        "blacklight",
        {"defense": "blacklight", "options": {"scope": "global"}, "name": "all-clients"},
    ],
    "attacks": ["cgba"],
    "threats": [{"norm": "l2", "epsilon": 0.9}],
    "preflight": {"benign": 5},
}


def test_a_worker_that_no_machine_can_hold_is_refused_and_not_waited_for() -> None:
    ray = pytest.importorskip("ray", reason="no Ray: pip install 'robustbox[cluster]'")
    with pytest.raises(InputError, match=r"1 CPUs and 1000 GPUs, but no machine .* has them .* ask for less"):
        Cluster(gpus=1000).connect()
    assert not ray.is_initialized()


def test_a_killed_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="no Ray: pip install 'robustbox[cluster]'")

    def service(log: Path, deadly: int | None) -> Any:
        """Counts its rows in a file, over all processes; the process that answers row number `deadly` dies, once."""

        def answer(rows: Any) -> Any:
            with log.open("ab", buffering=0) as file:
                os.write(file.fileno(), b"." * len(rows))
            seen, grave = log.stat().st_size, log.with_suffix(".dead")
            if deadly is not None and seen > deadly and not grave.exists():
                grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            margin = torch.stack([row.double().mean() for row in rows]) - 0.6
            return torch.stack([-margin, margin], dim=1).float()

        return answer

    grey = images(12, seed=2)
    data = {"grey": (grey, [0, 1] * 2 + [1] * 2 + [0] * 6)}  # of a shard of two, no image is right
    alone = run_audit(AUDIT, tmp_path / "alone", models={"toy": service(tmp_path / "alone.log", None)}, data=data)
    model = service(tmp_path / "two.log", (tmp_path / "alone.log").stat().st_size // 2)
    two = run_audit(AUDIT, tmp_path / "two", models={"toy": model}, data=data, executor=Cluster(workers=2, images=2))
    assert (tmp_path / "two.dead").exists()
    in_flight = 0
    for cell in alone.document["cells"]:
        (one, its), (other, theirs) = (read_run(tmp_path / name / "cells" / cell["id"]) for name in ("alone", "two"))
        in_flight += other["journal"]["in_flight"]
        assert without_times(one) == without_times(other)
        torch.testing.assert_close(its, theirs, rtol=0, atol=0, equal_nan=True)
    assert in_flight > 0
    bought = (tmp_path / "alone.log").stat().st_size
    assert bought < (tmp_path / "two.log").stat().st_size <= bought + in_flight
    assert not (tmp_path / "two" / "shards").exists()
    assert two.document["rows_asked"] == alone.document["rows_asked"] + in_flight
