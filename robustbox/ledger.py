"""A ledger on disk: rows stand in it before they are asked, so that those of a process that is killed are counted too."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustbox.errors import StorageError


class WrittenLedger(Counter[str]):
    """An oracle's ledger (rows by phase) that is written down whenever rows are charged to it.

    However the process dies, the file says no less than what the black box saw, and more by the rows of one pass at most:
    those in flight. It costs one small write a pass; as in a journal, only the loss of power can take the last of them.

    Args:
        path: the file.
        content: what the file holds, from the ledger; it never gets shorter.
    """

    def __init__(self, path: Path, content: Callable[[Counter[str]], bytes]) -> None:
        self._path, self._content = path, content
        super().__init__()

    def update(self, *counts: Any, **more: Any) -> None:
        """Add rows, and write them down.

        Raises:
            StorageError: they cannot be written, and must not be asked.
        """
        super().update(*counts, **more)
        if not self:  # it is being made
            return
        try:  # in place and in one go, whole or not at all; to replace a file makes file systems flush, at milliseconds each
            with open(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
                file.write(self._content(self))
        except OSError as error:
            raise StorageError(
                f"{self._path}, which counts the rows asked, cannot be written: {error.strerror}; "
                "make room, then give the same command again, and it goes on"
            ) from error
