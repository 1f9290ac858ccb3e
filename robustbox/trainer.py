"""A trainer makes a defense for one black box: it asks on the defender's ledger, learns, and returns the defense.

A trainer is found by name through the entry points `robustbox.trainers`; `python -m robustbox.defend NAME` runs it and
writes what it returns to a file that `--defense` reads (`robustbox.defense_file`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustbox.dispatch import joined
from robustbox.oracle import Oracle
from robustbox.protocol import Answer, BlackBox, Defense


def silent(line: str) -> None:
    """Say nothing."""


def clerks(first: int, n: int) -> Tensor:
    """Accounts of the evaluator's for rows number first, first + 1, ... of a ledger, each its own: int64 [n], below 0."""
    return -1 - torch.arange(first, first + n)


@dataclass(slots=True, eq=False)
class Workshop:
    """What a trainer is given: the black box behind an oracle, and the defender's own images.

    Args:
        oracle: the door to the black box; the rows that the trainer asks stand on its ledger.
        images: float32 [N,C,H,W] in [0, 1] on the black box's device: the defender's, never those that are attacked later.
        labels: N true classes.
        seed: the root of the trainer's randomness (`robustbox.identity.stream`).
        checkpoint: a file in which a long training may keep its state, to go on after it was interrupted; or None.
        report: takes one line on how the training stands.
        record: plain JSON values that the file of the defense shall hold beside it: what was measured, at which cost.
        max_rows: rows fused into one pass, always the same, so that a training can be repeated to the last bit; None is 64 on
            a CPU and 1024 elsewhere.
    """

    oracle: Oracle
    images: Tensor
    labels: list[int]
    seed: int = 0
    checkpoint: Path | None = None
    report: Callable[[str], None] = silent
    record: dict[str, object] = field(default_factory=dict)
    max_rows: int | None = None

    @property
    def box(self) -> BlackBox:
        """The black box: a trainer that may not see into it calls `ask` only."""
        return self.oracle.box

    def ask(self, rows: Tensor, phase: Literal["train", "verify"] = "train", defense: Defense | None = None) -> Answer:
        """Answer rows [n,C,H,W], each charged to a ledger, in passes of one size: scores are on the device.

        Args:
            rows: what to ask; the threat model's rounding applies.
            phase: `train` for what the defense learns from, `verify` for what judges it.
            defense: ask the black box behind this defense.
        """
        oracle = self.oracle if defense is None else self._behind(defense)
        parts = []
        with torch.no_grad():
            size = self.max_rows or (64 if oracle.box.device.type == "cpu" else 1024)
            for part in oracle.round(rows.detach()).split(size):
                accounts = clerks(sum(oracle.ledger.values()), len(part))
                parts.append(oracle.ask(part, accounts, {phase: len(part)}))
        return joined(parts)

    def _behind(self, defense: Defense) -> Oracle:
        oracle = Oracle(defense.wrap(self.box, self.seed), self.oracle.knowledge, self.oracle.levels)
        oracle.ledger = self.oracle.ledger
        return oracle


class Trainer(ABC):
    """Makes a defense for a black box; a frozen dataclass of hyper-parameters with one method.

    It prints nothing and touches no global random state. Where it must see into the model (hidden layers, gradients) it says
    so by an InputError for a black box that shows none, before it asks a row.
    """

    name: ClassVar[str]

    def options(self) -> dict[str, object]:
        """The hyper-parameters, for the record."""
        return dict(vars(self))

    @abstractmethod
    def train(self, shop: Workshop) -> Defense:
        """Make the defense; what was measured on the way goes to `shop.record`."""
