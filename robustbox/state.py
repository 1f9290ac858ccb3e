"""What defenses remember beyond the end of their process: a SQLite file, `python -m robustbox.serve --state FILE`.

It holds fingerprints, not images, and only of rows that were answered: what was in flight when the process ended was heard by
nobody, and is judged anew when it is sent again. What is written outlives the process however that ends; a loss of power may
take what was written last.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbox.errors import InputError, StorageError
from robustbox.protocol import Answer
from robustbox.wire import pack, pack_answer, unpack, unpack_answer

_MARK = 0x52424F58
"""Tells these files from other databases (SQLite's application_id); it changes when the tables change their meaning."""
_TABLES = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS identity (content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shelves (shelf INTEGER PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS standings (shelf INTEGER, account INTEGER, content TEXT NOT NULL,
    PRIMARY KEY (shelf, account)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prints (shelf INTEGER, scope TEXT, number INTEGER, tensor INTEGER NOT NULL,
    content BLOB NOT NULL, answer BLOB, PRIMARY KEY (shelf, scope, number));
COMMIT
"""


class State:
    """The file, locked until `close`.

    Args:
        path: made where there is none.
        identity: what fingerprints and standings hang on: plain JSON values.

    Attributes:
        shelves: how many defenses keep something here.

    Raises:
        InputError: it belongs to other defenses, is no such file, is in use, or cannot be written.
    """

    def __init__(self, path: str, identity: Mapping[str, Any]) -> None:
        self.path, self.shelves = path, 0
        content = json.dumps(identity, sort_keys=True)
        try:
            self._database = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
            known = self._opened(content)
        except sqlite3.Error as error:
            raise InputError(
                f"the state {path} cannot be used ({error}): end the service that uses it, or choose another file"
            ) from error
        if known != content:
            self.close()
            one, other = json.loads(known), json.loads(content)
            differing = sorted(key for key in other if one.get(key) != other[key])
            raise InputError(
                f"the state {path} was kept by another service (its {', '.join(differing)} differ): give that one's own "
                "options, or choose another file"
            )

    def _opened(self, content: str) -> str:
        """The identity of the file, which is this one where it is new."""
        ask = self._database.execute
        tables, mark = (
            ask(text).fetchone()[0] for text in ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id")
        )
        if tables and mark != _MARK:
            raise InputError(f"{self.path} is another kind of database: choose another file for the state")
        settings = (
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            f"application_id = {_MARK}",
        )
        for setting in settings:
            ask(f"PRAGMA {setting}")
        self._database.executescript(_TABLES)
        ask("INSERT INTO identity SELECT ? WHERE NOT EXISTS (SELECT * FROM identity)", (content,))
        return str(ask("SELECT content FROM identity").fetchone()[0])

    def shelf(self) -> Shelf:
        """The place of the next defense; they must come in the same order each time."""
        self.shelves += 1
        return Shelf(self._database, self.shelves, self.path)

    def close(self) -> None:
        """Give the file back."""
        self._database.close()


class Shelf:
    """What one defense keeps: fingerprints by scope, oldest first; a standing for each account; and some totals."""

    def __init__(self, database: sqlite3.Connection, number: int, path: str) -> None:
        self._database, self._number, self._path = database, number, path

    def totals(self) -> dict[str, Any]:
        """What `note` was given last, or nothing."""
        found = self._database.execute("SELECT content FROM shelves WHERE shelf = ?", (self._number,)).fetchone()
        return {} if found is None else dict(json.loads(found[0]))

    def standings(self) -> Iterator[tuple[int, list[Any]]]:
        """Accounts, and what `hold` was given last about each."""
        found = self._database.execute("SELECT account, content FROM standings WHERE shelf = ?", (self._number,))
        yield from ((account, json.loads(content)) for account, content in found)

    def prints(self, device: torch.device) -> Iterator[tuple[str, Any, Answer | None]]:
        """Scopes, fingerprints and answers, as they were stored; what was a tensor stands on the device."""
        order = "SELECT scope, tensor, content, answer FROM prints WHERE shelf = ? ORDER BY scope, number"
        for scope, tensor, content, answer in self._database.execute(order, (self._number,)):
            (array,) = unpack(content, 1)
            fingerprint = torch.from_numpy(array.copy()).to(device) if tensor else array
            yield scope, fingerprint, None if answer is None else unpack_answer(answer, 1)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What fails while it lasts, fails because of what stands in the file.

        Raises:
            InputError: it is not what was written.
        """
        try:
            yield
        except (sqlite3.Error, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the state {self._path} is damaged ({error}): choose another file") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written while it lasts is written as a whole, or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self._database.execute("BEGIN")
            yield
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise StorageError(
                f"the state {self._path} cannot be written ({error}): make room, and ask again"
            ) from error
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def store(self, scope: str, fingerprint: Any, answer: Answer | None, most: int) -> None:
        """Add a fingerprint (array, tensor or number), perhaps with its answer, to a scope, and forget all but the newest."""
        tensor = isinstance(fingerprint, Tensor)
        content = pack(fingerprint.cpu().numpy() if tensor else np.asarray(fingerprint))
        place = self._number, scope
        self._database.execute(
            "INSERT INTO prints SELECT ?, ?, coalesce(max(number), 0) + 1, ?, ?, ? FROM prints WHERE shelf = ? AND scope = ?",
            (*place, tensor, content, None if answer is None else pack_answer(answer), *place),
        )
        self._database.execute(
            "DELETE FROM prints WHERE shelf = ? AND scope = ? AND number <= "
            "(SELECT max(number) FROM prints WHERE shelf = ? AND scope = ?) - ?",
            (*place, *place, most),
        )

    def clear(self, scope: str) -> None:
        """Forget the fingerprints of a scope."""
        self._database.execute("DELETE FROM prints WHERE shelf = ? AND scope = ?", (self._number, scope))

    def hold(self, account: int, standing: list[Any]) -> None:
        """Keep what is held against an account, in place of what was before: plain JSON values."""
        self._database.execute(
            "INSERT OR REPLACE INTO standings VALUES (?, ?, ?)", (self._number, account, json.dumps(standing))
        )

    def note(self, totals: Mapping[str, Any]) -> None:
        """Keep totals, in place of those before: plain JSON values."""
        self._database.execute("INSERT OR REPLACE INTO shelves VALUES (?, ?)", (self._number, json.dumps(dict(totals))))
