"""A ledger on disk is there before its rows are asked, and what cannot be counted is not asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustbox.errors import StorageError
from robustbox.ledger import WrittenLedger
from robustbox.oracle import Oracle
from robustbox.protocol import Answer
from tests.toys import HalfSpace, images


def ask(oracle: Oracle, n: int) -> None:
    oracle.ask(images(n), torch.zeros(n, dtype=torch.int64), {"verify": n})


def content(ledger: Counter[str]) -> bytes:
    return str(7 + ledger["verify"]).encode()


def test_rows_are_written_down_before_they_are_asked(tmp_path: Path) -> None:
    class Reader(HalfSpace):
        """Reads the file when it is asked."""

        def of(self, rows: Tensor) -> Answer:
            read.append(path.read_text())
            return super().of(rows)

    read: list[str] = []
    path, oracle = tmp_path / "rows", Oracle(Reader())
    oracle.ledger = WrittenLedger(path, content)
    assert not path.exists()
    for n in (2, 1, 4):
        ask(oracle, n)
    assert read == ["9", "10", "14"]
    assert oracle.ledger == {"verify": 7}


def test_rows_that_cannot_be_counted_are_not_asked(tmp_path: Path) -> None:
    box = HalfSpace()
    oracle = Oracle(box)
    oracle.ledger = WrittenLedger(tmp_path / "absent" / "rows", content)
    with pytest.raises(StorageError, match=r"cannot be written: .*; make room, then give the same command") as told:
        ask(oracle, 2)
    assert "\n" not in str(told.value)
    assert box.rows == 0
