"""Which frames hold the events of a stream: one SQLite file for all partitions of a shard.

The idea: the log has everything already, so this is a copy that may be lost. Rows and how far each
partition was read are written in one transaction, without a sync; what a crash leaves behind is
compared with the log when it is used, and made anew from there where it does not fit.

Used by the shard's helper thread alone; nothing here may be called on its loop.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aegis_cluster.ids import GroupId

FORMAT: Final = 1
CACHE_KIB: Final = 8 * 1024
"""All the memory that the index takes, whatever it holds."""
_TABLES: Final = """
CREATE TABLE spans (
    grp INTEGER, stream TEXT, first INTEGER, count INTEGER, frame INTEGER, offset INTEGER,
    PRIMARY KEY (grp, stream, first)
) WITHOUT ROWID;
CREATE TABLE progress (grp INTEGER PRIMARY KEY, frame INTEGER);
"""
_TROUBLE: Final = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")
"""Errors that speak of the disk and not of what is written there."""


class Span(NamedTuple):
    """Versions first, first + 1, … of one stream, `count` of them, in one frame from `offset`."""

    stream: str
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    frame: int
    offset: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1


class IndexDamaged(Exception):
    """What the file holds is not what was written, or not what the log has."""


class IndexUnavailable(Exception):
    """The disk does not do what the index needs; it may later."""


class StreamIndex:
    """path: of the file; None: in memory, for tests and simulations."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def progress(self, group: GroupId) -> int:
        """The last frame of a partition whose streams are in here; 0 for none."""
        with self._guarded() as connection:
            row = connection.execute("SELECT frame FROM progress WHERE grp = ?", (group,))
            found = row.fetchone()
            return 0 if found is None else int(found[0])

    def add(self, group: GroupId, spans: Iterable[Span], *, upto: int) -> None:
        """Take in what the frames up to `upto` hold, all of it or nothing."""
        rows = [(group, *span) for span in spans]
        with self._guarded() as connection, connection:
            connection.execute("BEGIN")
            connection.executemany("INSERT OR REPLACE INTO spans VALUES (?, ?, ?, ?, ?, ?)", rows)
            connection.execute("INSERT OR REPLACE INTO progress VALUES (?, ?)", (group, upto))

    def spans(
        self, group: GroupId, stream: str, low: int, high: int, *, backwards: bool
    ) -> Iterator[Span]:
        """Where versions low … high (inclusive) stand, in their order or from the last one on."""
        order = "DESC" if backwards else "ASC"
        with self._guarded() as connection:
            rows = connection.execute(
                "SELECT stream, first, count, frame, offset FROM spans WHERE grp = ?1 AND"
                " stream = ?2 AND first <= ?4 AND first >= ifnull((SELECT max(first) FROM spans"
                " WHERE grp = ?1 AND stream = ?2 AND first <= ?3), ?3)"
                f" ORDER BY first {order}",
                (group, stream, low, high),
            )
            for row in rows:
                yield Span(*row)

    def forget(self, group: GroupId) -> None:
        """Drop what is known of a partition."""
        with self._guarded() as connection, connection:
            connection.execute("BEGIN")
            connection.execute("DELETE FROM spans WHERE grp = ?", (group,))
            connection.execute("DELETE FROM progress WHERE grp = ?", (group,))

    def begin_anew(self) -> None:
        """Throw the file away. Raises `IndexUnavailable` where that cannot be done."""
        self.close()
        for suffix in ("", "-wal", "-shm", "-journal") if self._path else ():
            try:
                os.unlink(f"{self._path}{suffix}")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise IndexUnavailable(str(error)) from error

    def close(self) -> None:
        """Let go of the file; the next call opens it again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        """Raise `IndexDamaged` or `IndexUnavailable` for whatever SQLite says."""
        try:
            if self._connection is None:
                self._connection = self._open()
            yield self._connection
        except OSError as error:
            raise IndexUnavailable(str(error)) from error
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", None) or ""
            if name.startswith(_TROUBLE):
                raise IndexUnavailable(str(error)) from error
            raise IndexDamaged(str(error)) from error

    def _open(self) -> sqlite3.Connection:
        if self._path is not None:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
        # One thread at a time uses it, but the one that closes it may be another.
        connection = sqlite3.connect(
            self._path or ":memory:", check_same_thread=False, isolation_level=None
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT")
            elif version != FORMAT:
                raise IndexDamaged(f"it has format {version}, and this program writes {FORMAT}")
        except BaseException:
            connection.close()
            raise
        return connection
