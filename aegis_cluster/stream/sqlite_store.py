"""A task's state in a file: a sorted mapping that takes back what was not committed.

The idea: everything between two commits is one transaction of SQLite, so a crash, or `rollback`,
leaves the state of the last commit. Writes wait in memory until somebody scans or much has
gathered: many rows at once cost a fraction of each alone.

The file is only a copy: the changelog is the truth. So nothing is synced, and a file that an
earlier run of the machine has left is thrown away, since a power cut may have torn it.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import StorageFailed
from aegis_cluster.limits import STREAM_STORE_BYTES_CACHED, STREAM_STORE_ROWS_WAITING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_WRITE: Final = "INSERT OR REPLACE INTO state VALUES (?, ?)"
_TOGETHER: Final = 2_000
_WRITE_MANY: Final = f"{_WRITE}{', (?, ?)' * (_TOGETHER - 1)}"
_DELETE: Final = "DELETE FROM state WHERE name = ?"


class SqliteStore:
    """One file, used by one task at a time.

    identity: of the changelog that it copies; a file with another one is begun anew. checkpoint:
    up to which offset of the changelog the last commit holds all of it for sure.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._waiting: dict[bytes, bytes | None] = {}
        self._in_transaction = False
        self.checkpoint = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(f"{identity} {_boot_id()}")
        except (OSError, sqlite3.Error) as error:
            raise StorageFailed(
                f"The state at {path} cannot be opened: {error}. Choose another state_dir, or"
                " delete the file: it is a copy of the changelog."
            ) from error

    def _open(self, identity: str) -> None:
        self._database = self._connect()
        try:
            found = dict(self._database.execute("SELECT name, value FROM about"))
        except sqlite3.DatabaseError:
            found = {}
        if found.get("identity") != identity:
            self._database.close()
            self.destroy()
            self._database = self._connect()
            self._make(identity)
            found = {}
        self.checkpoint = int(found.get("checkpoint", 0))

    def _connect(self) -> sqlite3.Connection:
        # Used by one thread at a time: the event loop's, and a helper's while it restores.
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        for pragma in (
            "journal_mode = WAL",
            "synchronous = OFF",
            "locking_mode = EXCLUSIVE",
            f"cache_size = -{STREAM_STORE_BYTES_CACHED // 1024}",
        ):
            database.execute(f"PRAGMA {pragma}")
        return database

    def _make(self, identity: str) -> None:
        self._database.execute("BEGIN")
        self._database.execute("CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
        self._database.execute(
            "CREATE TABLE state (name BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
        )
        self._database.execute("INSERT INTO about VALUES ('identity', ?)", (identity,))
        self._database.execute("COMMIT")

    # ---- a store

    def get(self, key: bytes) -> bytes | None:
        """None where there is nothing."""
        if key in self._waiting:
            return self._waiting[key]
        row = self._database.execute("SELECT value FROM state WHERE name = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: bytes, value: bytes) -> None:
        """Add or replace."""
        self._waiting[key] = value
        if len(self._waiting) >= STREAM_STORE_ROWS_WAITING:
            self._write()

    def delete(self, key: bytes) -> None:
        """Nothing happens where there is nothing."""
        self._waiting[key] = None
        if len(self._waiting) >= STREAM_STORE_ROWS_WAITING:
            self._write()

    def scan(self, low: bytes, high: bytes, limit: int | None = None) -> list[tuple[bytes, bytes]]:
        """In order of the keys, `low` included, `high` not; the first `limit` of them."""
        self._write()
        return self._database.execute(
            "SELECT name, value FROM state WHERE name >= ? AND name < ? ORDER BY name LIMIT ?",
            (low, high, -1 if limit is None else limit),
        ).fetchall()

    def _write(self) -> None:
        if not self._waiting:
            return
        self._begin()
        rows = sorted(self._waiting.items())
        self._waiting = {}
        gone = [(key,) for key, value in rows if value is None]
        kept = [row for row in rows if row[1] is not None]
        self._reporting(lambda: self._database.executemany(_DELETE, gone))
        self._reporting(lambda: self._database.executemany(_WRITE, kept))

    def _begin(self) -> None:
        if not self._in_transaction:
            self._database.execute("BEGIN")
            self._in_transaction = True

    def _reporting(self, work: Callable[[], object]) -> None:
        try:
            work()
        except sqlite3.Error as error:
            raise StorageFailed(f"The state at {self._path} cannot be written: {error}.") from error

    # ---- for the runtime

    def load(self, rows: Mapping[bytes, bytes | None], checkpoint: int) -> None:
        """Take many changes over from the changelog, up to its offset `checkpoint`, and commit.

        May run in a helper thread: many rows are one statement, which lets other threads work.
        """
        self._begin()
        gone = sorted((key,) for key, value in rows.items() if value is None)
        self._reporting(lambda: self._database.executemany(_DELETE, gone))
        kept = sorted(row for row in rows.items() if row[1] is not None)
        whole = len(kept) - len(kept) % _TOGETHER
        for start in range(0, whole, _TOGETHER):
            part = list(chain.from_iterable(kept[start : start + _TOGETHER]))
            self._reporting(partial(self._database.execute, _WRITE_MANY, part))
        self._reporting(lambda: self._database.executemany(_WRITE, kept[whole:]))
        self.commit(checkpoint)

    def commit(self, checkpoint: int | None = None) -> None:
        """Keep everything; checkpoint: None: as it was."""
        self._write()
        if checkpoint is not None:
            self._begin()
            self.checkpoint = checkpoint
            self._reporting(
                lambda: self._database.execute(
                    "INSERT OR REPLACE INTO about VALUES ('checkpoint', ?)", (str(checkpoint),)
                )
            )
        if self._in_transaction:
            self._reporting(lambda: self._database.execute("COMMIT"))
            self._in_transaction = False

    def rollback(self) -> None:
        """Take back everything since the last commit."""
        self._waiting = {}
        if self._in_transaction:
            self._reporting(lambda: self._database.execute("ROLLBACK"))
            self._in_transaction = False

    def close(self) -> None:
        """Let go of the file; what is not committed is lost."""
        self.rollback()
        self._database.close()

    def destroy(self) -> None:
        """Delete the file."""
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + ending).unlink()


def _boot_id() -> str:
    """Of this run of the machine; where it is not told, files are begun anew at each start."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"
