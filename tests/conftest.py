"""What all tests share: one thread a worker, no deadlines, and where real data is looked for."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("robustbox", deadline=None, derandomize=True)
hypothesis.settings.load_profile("robustbox")

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that no repository holds: `ROBUSTBOX_DATA`, else `../shared/data`."""
    named = os.environ.get("ROBUSTBOX_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set ROBUSTBOX_DATA to a folder that holds it")
    return folder
