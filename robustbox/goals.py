"""Goals as one integer a row, so that a whole pass of rows is judged at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustbox.protocol import ANSWERED


def goal(label: int, target: int | None) -> int:
    """The class to reach, or, for an untargeted goal, the class to leave, written as -1 - class."""
    return -1 - label if target is None else target


def reached(goals: NDArray[np.int64], labels: NDArray[np.int64], status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which rows reached their goals; a row that was not answered never did. All [n]."""
    hit: NDArray[np.bool_] = np.where(goals < 0, labels != -1 - goals, labels == goals) & (status == ANSWERED)
    return hit
