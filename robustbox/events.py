"""A list of events in a SQLite file that only grows: what is appended is on disk, and stays whatever happens to the process.

Write-ahead logging keeps every appended event through the death of the process (through the loss of power too where the list
is `durable`). Events are chained by hashes, so that a change anywhere shows. The process that writes holds SQLite's lock on
the file, which goes with the process, however that ends.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from robustbox.errors import InputError, StorageError

FORMAT = 1
"""The version of the file; it changes when events change their meaning."""
_START = bytes(16)
_TABLE = (
    "CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, rows INTEGER NOT NULL, "
    "content BLOB NOT NULL, times BLOB NOT NULL, chain BLOB NOT NULL)"
)


class Event(NamedTuple):
    """One event.

    Args:
        kind: what happened.
        rows: how many rows it is about.
        content: the rest of it.
        times: float64 readings of a clock since the event before.
    """

    kind: int
    rows: int = 0
    content: bytes = b""
    times: bytes = b""

    def chained(self, before: bytes) -> bytes:
        """The hash of this event and all before it."""
        head = struct.pack("<BQQ", self.kind, self.rows, len(self.content))
        return hashlib.blake2b(before + head + self.content + self.times, digest_size=16).digest()


class DamagedError(InputError):
    """The file is not what was written."""


class EventLog:
    """The events of a file, which is locked until `close`.

    Args:
        path: the file; made where there is none.
        fresh: forget what it holds, damaged or not.

    Raises:
        InputError: another process writes to the file, it is damaged, or it cannot be written.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        try:
            self._database = self._open()
        except DamagedError:
            if not fresh:
                raise
            for part in ("", "-wal", "-shm"):
                path.with_name(path.name + part).unlink(missing_ok=True)
            self._database = self._open()
        self._chain, self._last = _START, 0
        if fresh:
            self.clear()

    def read(self, verify: bool = False) -> Iterator[Event]:
        """The events that stand in the file now, in order.

        Args:
            verify: hold their chain against what they say; must be done once, to the end, before the first `append`.

        Raises:
            DamagedError: an event is not what was written.
        """
        order = "SELECT id, kind, rows, content, times, chain FROM events WHERE id <= ? ORDER BY id"
        chain = _START
        with self._reading():
            last = self._database.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0]
            for number, *fields, stated in self._database.execute(order, (last,)):
                event = Event(*fields)
                if verify:
                    try:
                        chain = event.chained(chain)
                    except (TypeError, struct.error):  # a value of another kind, or sign
                        chain = b""
                    if chain != stated or number != self._last + 1:
                        raise DamagedError(self._damage(f"event {number} is not what was written"))
                    self._chain, self._last = chain, number
                yield event

    def append(self, event: Event) -> None:
        """Add an event; when this returns it is on disk.

        Raises:
            StorageError: it cannot be written.
        """
        chain = event.chained(self._chain)
        try:
            self._database.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (self._last + 1, *event, chain))
        except sqlite3.Error as error:
            raise StorageError(
                f"the journal {self.path} cannot be written ({error}): what was answered before is safe; "
                "make room, then give the same command again, and the run goes on"
            ) from error
        self._chain, self._last = chain, self._last + 1

    def clear(self) -> None:
        """Forget all events."""
        with self._reading():
            self._database.execute("DELETE FROM events")
        self._chain, self._last = _START, 0

    def durable(self) -> None:
        """From now on let every event outlive the loss of power too, at the price of one flush of the disk each."""
        self._database.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        """Give the lock back."""
        self._database.close()

    def _open(self) -> sqlite3.Connection:
        with self._reading():
            commits = _commits(self.path.with_name(self.path.name + "-wal"))
            database = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
            try:
                for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
                    database.execute(f"PRAGMA {pragma}")
                database.executescript(f"BEGIN IMMEDIATE; {_TABLE}; COMMIT")
                recovered = database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
                if sum(frame > recovered for frame in commits) > 1:  # a process that dies tears one at most
                    raise DamagedError(self._damage("its write-ahead log has a hole"))
                if (found := database.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                    raise DamagedError(self._damage(found))
                if (version := database.execute("PRAGMA user_version").fetchone()[0]) not in (0, FORMAT):
                    raise DamagedError(f"{self.path} has format {version}, this robustbox reads format {FORMAT}")
                database.execute(f"PRAGMA user_version = {FORMAT}")
            except BaseException:
                database.close()
                raise
        return database

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """SQLite's errors as the errors of this project."""
        try:
            yield
        except OSError as error:
            raise InputError(f"the journal {self.path} cannot be read: {error.strerror}") from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise InputError(
                    f"another run is writing to {self.path.parent}: wait until it ends, or choose another folder"
                ) from None
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise DamagedError(self._damage(str(error))) from None
            raise InputError(f"the output folder {self.path.parent} cannot be written to: {error}") from error

    def _damage(self, how: str) -> str:
        where = f"the journal {self.path} is damaged ({' '.join(how.split())})"
        return f"{where}: put a sound copy in its place, or start over with --fresh (fresh=True)"


def _commits(log: Path) -> list[int]:
    """The frames, counted from 1, that end a transaction in a write-ahead log: more may stand there than SQLite recovers.

    SQLite stops at the first frame whose checksum is wrong and does not say so.

    Raises:
        sqlite3.DatabaseError: the log's header is not what was written.
    """
    content = log.read_bytes() if log.exists() else b""
    if len(content) <= 32:
        return []
    order: str = ">" if content[3] & 1 else "<"
    first = second = 0
    for a, b in struct.iter_unpack(f"{order}II", content[:24]):
        first = (first + a + second) & 0xFFFFFFFF
        second = (second + b + first) & 0xFFFFFFFF
    if struct.pack(">II", first, second) != content[24:32]:
        error = sqlite3.DatabaseError("the header of its write-ahead log is not what was written")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error
    step, salts = 24 + int.from_bytes(content[8:12], "big"), content[16:24]
    starts = range(32, len(content) - 23, step)
    return [
        k + 1
        for k, at in enumerate(starts)
        if content[at + 8 : at + 16] == salts and content[at + 4 : at + 8] != bytes(4)
    ]
