"""SQLite as a source: what `sqlite_schema`'s triggers have written down, read and trimmed.

The idea: the log's numbers are the positions, and they rise with commits, since SQLite has one
writer at a time. A read transaction sees the log and the tables at one moment, so a chunk of a
snapshot that is read once the log was read to its end has exactly the changes before it.

What happens to tables while nobody looks is found by `PRAGMA schema_version`: triggers are made
anew where they are missing or outdated, and the table's rows are read again, since changes may
have gone unseen (after a *truncate*, where deletes may have).

The rules it protects: a change is trimmed only once it is in the feed; every transaction is short,
so that writers wait for nobody; and a file that is older than its feed (a restored copy) is
noticed, and read anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgpack

from aegis_cluster.cdc.envelope import SNAPSHOT_OP, RowChange, encode_row_key
from aegis_cluster.cdc.events import ChangeSource
from aegis_cluster.cdc.progress import SnapshotProgress
from aegis_cluster.cdc.source import (
    CHUNK_BYTES,
    ROWS_PER_BATCH_MAX,
    SourceBatch,
)
from aegis_cluster.cdc.sqlite_schema import (
    LOG,
    SCHEMAS,
    SETUP,
    SNAPSHOTS,
    STATE,
    Table,
    describe,
    log_columns,
    quoted,
    trigger_sql,
    triggers_on,
    user_tables,
    widen_log,
)
from aegis_cluster.errors import SourceError, SourceUnavailable
from aegis_cluster.limits import FEED_MARK_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aegis_cluster.cdc.source import PartitionPoint

POLL_S: Final = 0.02
"""From one look at an idle database to the next; a look costs some microseconds."""
IDLE_S: Final = 0.5
"""An idle `read` returns after so long."""
BUSY_S: Final = 5.0
"""How long a writer may keep us waiting."""
TRIM_S: Final = 0.2
TRIM_WAIT_MS: Final = 50
TRIM_ROWS: Final = 5_000
"""What is confirmed is deleted from the log so often, or once it is so much."""
_TOO_OLD: Final = (3, 37, 0)
_START: Final = "s"
"""In the log: the rows of a table are to be read from here on."""
_GONE: Final = "g"
_CANDIDATE: Final = "x"

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Chunk:
    """A stretch of a table's rows: those after `after`, up to `end` (None: as many as fit)."""

    snapshot: int
    number: int
    after: list[Any] | None
    end: list[Any] | None = None

    def mark(self) -> bytes:
        values = [self.snapshot, self.number, self.after, self.end]
        data: bytes = msgpack.packb(values, unicode_errors="surrogateescape")
        return data


@dataclass(frozen=True, slots=True)
class _Token:
    """What a batch confirms: the log up to an id, and perhaps the end of a snapshot."""

    upto: int
    snapshot_done: int | None = None


class SQLiteSource:
    """A database file; every process that writes to it is captured.

    tables: which ones; None: all. name: of the feed; None: the file's name without its suffix.

    The file gets tables and triggers whose names begin with `_aegis_cdc`. One feed captures it at
    a time. `PRAGMA journal_mode = WAL` is not needed, but lets writers and readers go on at once.
    """

    def __init__(
        self, path: str | Path, *, tables: Sequence[str] | None = None, name: str | None = None
    ) -> None:
        self._path = Path(path)
        self._name = name or self._path.stem
        self._wanted = None if tables is None else frozenset(tables)
        self._thread: ThreadPoolExecutor | None = None
        self._database: _Database | None = None
        self._has_read = False

    @property
    def name(self) -> str:
        """Of the feed's topic."""
        return self._name

    async def open(self, feed: str, points: Sequence[PartitionPoint], rows_max: int) -> None:
        """See `Source.open`."""
        self._has_read = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"cdc {self._name}")

        def start() -> None:  # what it opens is known even if nobody waits for it any more
            self._database = _Database(self._path, self._wanted, feed, points, rows_max)

        await self._run(start)

    async def read(self) -> SourceBatch:
        """See `Source.read`."""
        database = self._opened()
        until = time.monotonic() + IDLE_S
        while True:
            batch = await self._run(database.read)
            if batch is not None or not self._has_read or time.monotonic() >= until:
                self._has_read = True
                return batch or SourceBatch(more=False)
            await asyncio.sleep(POLL_S)

    async def confirm(self, token: Any) -> None:
        """See `Source.confirm`."""
        if isinstance(token, _Token):
            await self._run(lambda: self._opened().confirm(token))

    async def close(self) -> None:
        """See `Source.close`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return

        def end() -> None:
            database, self._database = self._database, None
            if database is not None:
                database.close()

        with contextlib.suppress(sqlite3.Error):
            await asyncio.get_running_loop().run_in_executor(thread, end)
        thread.shutdown(wait=False)

    async def snapshot(self, table: str) -> None:
        """See `Source.snapshot`."""
        await self._run(lambda: self._opened().read_again(table))

    def progress(self) -> SnapshotProgress | None:
        """See `Source.progress`."""
        return None if self._database is None else self._database.progress()

    def _opened(self) -> _Database:
        if self._database is None:
            raise SourceError("This source is not open.")
        return self._database

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise SourceUnavailable(
                    f"{self._path} was locked by another process for {BUSY_S:g} s; trying again."
                ) from error
            raise SourceError(f"SQLite cannot go on with {self._path}: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise SourceError(f"SQLite cannot read {self._path}: {error}.") from error


class _Database:
    """The connection, in the one thread that uses it."""

    def __init__(
        self,
        path: Path,
        wanted: frozenset[str] | None,
        feed: str,
        points: Sequence[PartitionPoint],
        rows_max: int,
    ) -> None:
        if sqlite3.sqlite_version_info < _TOO_OLD:
            raise SourceError(
                f"SQLite {sqlite3.sqlite_version} is too old to capture changes; 3.37 will do."
            )
        if not path.is_file():
            raise SourceError(f"There is no database at {path}; make it first.")
        self._name = path.stem
        self._wanted = wanted
        self._rows_max = max(1, min(rows_max, ROWS_PER_BATCH_MAX))
        self._connection = sqlite3.connect(
            path, isolation_level=None, timeout=BUSY_S, check_same_thread=False
        )
        self._connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        self._schemas: dict[int, Table] = {}
        self._seen = 0
        """The last id of the log that was read."""
        self._floor = max((point.position for point in points), default=(0, 0))
        """The feed's highest position; what is read now comes above it, or is there already."""
        self._minor = 0
        self._schema_version = -1
        self._data_version = -1
        self._confirmed = self._trimmed = 0
        self._trim_at = 0.0
        self._pending: list[tuple[int, Table]] = []
        """Snapshots to be made, with the table as it is to be read."""
        self._group_end: int | None = None
        """The end of the transactions that were handed out in part."""
        self._rows_of_snapshot, self._rows_done = 0, 0
        self._rows_estimate: int | None = None
        self._chunk: _Chunk | None = None
        """The last chunk that was handed out."""
        self._lacking: frozenset[int] = frozenset()
        """Partitions that lack the chunk that the feed has in part."""
        try:
            self._prepare(feed, points)
        except BaseException:
            self._connection.close()
            raise

    # ---- starting

    def _prepare(self, feed: str, points: Sequence[PartitionPoint]) -> None:
        with self._writing():
            for statement in SETUP:
                self._connection.execute(statement)
            released = self._bind(feed)
            anew = self._is_out_of_step() or released
        self._reconcile(anew=anew)
        self._load_pending()
        self._find_chunk(points)

    def _bind(self, feed: str) -> bool:
        """One feed captures a file; two would trim what the other needs. Returns whether it was
        captured before, and then let go of."""
        bound = self._state("feed")
        if bound is None:
            self._set_state("feed", feed)
            self._set_state("id", uuid.uuid4().hex)
        elif bound != feed:
            raise SourceError(
                f"{self._name} is captured into the feed {bound} already. If that one is given"
                f" up, run 'DELETE FROM {STATE}' in the database, and start again."
            )
        return bound is None and self._has_snapshots()

    def _is_out_of_step(self) -> bool:
        """Whether feed and file do not continue each other: the feed is new and the file is not, or
        the file is older than what the feed has of it. Numbers go on above the feed's."""
        major = self._floor[0]
        row = self._connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = ?", (LOG,)
        ).fetchone()
        last = 0 if row is None else row[0]
        if last < major:
            if row is None:
                self._connection.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", (LOG, major))
            else:
                self._connection.execute(
                    "UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (major, LOG)
                )
            return True
        has_trimmed = self._state("trimmed") is not None
        return self._has_snapshots() and self._floor == (0, 0) and has_trimmed

    def _has_snapshots(self) -> bool:
        found = self._connection.execute(f"SELECT 1 FROM {SNAPSHOTS} LIMIT 1")
        return found.fetchone() is not None

    def _load_pending(self) -> None:
        rows = self._connection.execute(
            f"SELECT id, schema FROM {SNAPSHOTS} WHERE NOT done AND started ORDER BY id"
        )
        self._pending = [(number, self._schema(schema)) for number, schema in rows.fetchall()]

    def _find_chunk(self, points: Sequence[PartitionPoint]) -> None:
        """Where the feed's marks say a snapshot was broken off."""
        marks = {place: point.mark for place, point in enumerate(points) if point.mark}
        found = {
            place: msgpack.unpackb(mark, unicode_errors="surrogateescape")
            for place, mark in marks.items()
        }
        if not found:
            return
        newest = max(found.values(), key=lambda values: values[:2])
        if not self._is_open(newest[0]):
            return  # that snapshot is done, or of a file before this one
        self._chunk = _Chunk(*newest)
        self._lacking = frozenset(
            place for place in range(len(points)) if found.get(place) != newest
        )

    # ---- the tables and their triggers

    def _reconcile(self, *, anew: bool = False) -> None:
        """Have the triggers that the tables need as they are now; anew: and read all rows again."""
        with self._writing():
            known = self._known_tables()
            present = [n for n in user_tables(self._connection) if self._is_wanted(n)]
            for name in present:
                self._reconcile_table(name, known.get(name), anew=anew)
            for name in sorted(known.keys() - set(present)):
                self._let_go(name, known[name])
            missing = sorted((self._wanted or frozenset()) - set(present))
            if missing and not known:
                raise SourceError(
                    f"{self._name} has no table {missing[0]!r}; make it, or do not name it."
                )
            self._schema_version = self._pragma("schema_version")
        self._data_version = -1  # what this connection writes does not count there

    def _let_go(self, name: str, schema: int) -> None:
        """A table is gone, or is not wanted any more."""
        self._connection.execute(f"DELETE FROM {SNAPSHOTS} WHERE name = ?", (name,))
        for trigger in triggers_on(self._connection, name):
            self._connection.execute(f"DROP TRIGGER {quoted(trigger)}")
        if self._is_wanted(name):
            log.warning("Table %s of %s is gone; so are its rows.", name, self._name)
            self._note(schema, _GONE)

    def _known_tables(self) -> dict[str, int]:
        """The newest schema of every table that is captured, by name."""
        rows = self._connection.execute(f"SELECT name, max(schema) FROM {SNAPSHOTS} GROUP BY name")
        return dict(rows.fetchall())

    def _is_wanted(self, name: str) -> bool:
        return self._wanted is None or name in self._wanted

    def _reconcile_table(self, name: str, known: int | None, *, anew: bool) -> None:
        table = describe(self._connection, name)
        if table.rowid is None and not table.key:
            raise SourceError(
                f"Table {name!r} has columns called rowid, oid and _rowid_ and no primary key, so"
                " its rows cannot be told apart. Give it a primary key, or name the tables to"
                " capture."
            )
        present = triggers_on(self._connection, name)
        if known is not None and not anew:
            # A column that was renamed was renamed in the triggers, too, by SQLite.
            if self._schema(known) == table and present == trigger_sql(table, known):
                return
            log.warning("Table %s of %s was altered; its rows are read again.", name, self._name)
        elif not table.key:
            log.warning(
                "Table %s of %s has no primary key; its rows go by their rowid, which VACUUM may"
                " change.", name, self._name
            )  # fmt: skip
        schema = self._new_schema(table)
        made = trigger_sql(table, schema)
        # Without one of the triggers deletes may have gone unseen, and under other names of its key
        # a row is another one: in both cases what the feed has of the table is void.
        void = anew or (
            known is not None and (len(present) < len(made) or self._schema(known).key != table.key)
        )
        for trigger in present:
            self._connection.execute(f"DROP TRIGGER {quoted(trigger)}")
        widen_log(self._connection, len(table.columns))
        for sql in made.values():
            self._connection.execute(sql)
        self._note(schema, _START, void=void)

    def _new_schema(self, table: Table) -> int:
        cursor = self._connection.execute(
            f"INSERT INTO {SCHEMAS} (name, body) VALUES (?, ?)", (table.name, table.body())
        )
        schema = cursor.lastrowid or 0
        self._schemas[schema] = table
        return schema

    def _note(self, schema: int, op: str, *, void: bool = False) -> None:
        """Write into the log that a table's rows begin anew, or are gone."""
        snapshot = None
        if op == _START:
            name = self._schema(schema).name
            self._connection.execute(f"DELETE FROM {SNAPSHOTS} WHERE name = ?", (name,))
            snapshot = self._connection.execute(
                f"INSERT INTO {SNAPSHOTS} (name, schema) VALUES (?, ?)", (name, schema)
            ).lastrowid
        self._connection.execute(
            f"INSERT INTO {LOG} (schema, op, ts_ms, o_rowid, n_rowid) VALUES (?, ?, ?, ?, ?)",
            (schema, op, _now_ms(), snapshot, int(void)),
        )

    def _schema(self, number: int) -> Table:
        found = self._schemas.get(number)
        if found is None:
            name, body = self._connection.execute(
                f"SELECT name, body FROM {SCHEMAS} WHERE id = ?", (number,)
            ).fetchone()
            found = self._schemas[number] = Table.from_body(name, body)
        return found

    # ---- reading

    def read(self) -> SourceBatch | None:
        """What there is to send now; None while there is nothing."""
        self._trim(force=False)
        if self._pragma("schema_version") != self._schema_version:
            self._reconcile()
        data_version = self._pragma("data_version")
        if data_version == self._data_version and not self._pending:
            return None
        with self._reading():
            rows, drained = self._group_rows()
            changes = list(self._changes(rows))
            if changes and self._group_end is None:
                changes[-1] = replace(changes[-1], is_last=True)
            if rows:
                self._seen = rows[-1][0]
            elif self._pending and self._pragma("schema_version") == self._schema_version:
                return self._next_chunk()
        if drained and not self._pending:
            self._data_version = data_version
        more = bool(self._pending) or not drained
        return SourceBatch(changes, token=_Token(self._seen), more=more) if rows else None

    def _group_rows(self) -> tuple[list[Any], bool]:
        """What comes next of the log, and whether it is all of it.

        Triggers cannot tell transactions apart. What was committed when we look is one or several
        whole ones, a *group*; it may take several batches, and ends with the last.
        """
        is_new = self._group_end is None
        if self._group_end is None:
            found = self._connection.execute(
                f"SELECT max(id) FROM {LOG} WHERE op <> '{_CANDIDATE}'"
            ).fetchone()
            self._group_end = found[0] or self._seen
        rows = self._log_rows(self._group_end)
        if len(rows) < self._rows_max or rows[-1][0] >= self._group_end:
            self._group_end = None
        return rows, is_new and self._group_end is None

    def _log_rows(self, upto: int) -> list[Any]:
        width = log_columns(self._connection)
        sides = ", ".join(f"{side}{n}" for side in ("o", "n") for n in range(width))
        columns = f"id, schema, op, ts_ms, o_rowid, n_rowid{', ' if width else ''}{sides}"
        return self._connection.execute(
            # The id of a candidate that is dropped may be given again; it was never a position.
            f"SELECT {columns} FROM {LOG} WHERE id > ? AND id <= ? AND op <> '{_CANDIDATE}'"
            " ORDER BY id LIMIT ?",
            (self._seen, upto, self._rows_max),
        ).fetchall()

    def _changes(self, rows: Sequence[Any]) -> Iterator[RowChange]:
        for row in rows:
            number, schema, op, ts_ms, old_rowid, new_rowid, *values = row
            table = self._schema(schema)
            if op == _START:
                self._begin_snapshot(old_rowid, table)
                if not new_rowid:
                    continue
            if op in (_START, _GONE):
                yield RowChange(self._source(table), "t", (number, 0), ts_ms, None)
                continue
            half = len(values) // 2
            before = _Row(table, values[:half], old_rowid) if op in ("u", "d") else None
            after = _Row(table, values[half:], new_rowid) if op in ("c", "u") else None
            yield from self._row_changes(table, op, number, ts_ms, before, after)

    def _row_changes(
        self,
        table: Table,
        op: str,
        number: int,
        ts_ms: int,
        before: _Row | None,
        after: _Row | None,
    ) -> Iterator[RowChange]:
        """One change; two where the key has changed, since a row is its key."""
        source = self._source(table)
        # As in the feed: 1 and 1.0 are one key to SQLite, and two to whoever reads JSON.
        moved = (
            before is not None
            and after is not None
            and encode_row_key(before.key) != encode_row_key(after.key)
        )
        if before is not None and after is not None and moved:
            yield RowChange(source, "d", (number, 0), ts_ms, before.key, before.values)
            yield RowChange(source, "c", (number, 1), ts_ms, after.key, None, after.values)
            return
        row = after or before
        yield RowChange(
            source,
            op,
            (number, 0),
            ts_ms,
            row.key if row else None,
            before.values if before else None,
            after.values if after else None,
        )

    def _source(self, table: Table) -> ChangeSource:
        return ChangeSource(self._name, "", table.name, "sqlite")

    # ---- snapshots

    def _begin_snapshot(self, snapshot: int | None, table: Table) -> None:
        """The log says that the rows of a table are to be read from here on."""
        if snapshot is None or any(number == snapshot for number, _ in self._pending):
            return
        if self._is_open(snapshot):
            self._pending.append((snapshot, table))

    def _is_open(self, snapshot: int) -> bool:
        """Whether it is to be made still, and no newer one of its table has taken its place."""
        row = self._connection.execute(
            f"SELECT 1 FROM {SNAPSHOTS} WHERE id = ? AND NOT done", (snapshot,)
        )
        return row.fetchone() is not None

    def _next_chunk(self) -> SourceBatch | None:
        """The next rows of the table that is being read, as of this transaction."""
        snapshot, table = self._pending[0]
        if not self._is_open(snapshot):  # the table was altered, or is gone
            self._pending.pop(0)
            return SourceBatch()
        last, again, only = self._chunk, False, None
        if last is not None and last.snapshot == snapshot:
            again, only = bool(self._lacking), self._lacking or None
            chunk = last if again else _Chunk(snapshot, last.number + 1, last.end)
        else:
            chunk = _Chunk(snapshot, 0, None)
        self._lacking = frozenset()
        rows, more = self._rows_of(table, chunk, bounded=again)
        if rows and not again:
            chunk.end = list(rows[-1].place(table))
        done = None if more or again else snapshot
        if done is not None:
            self._pending.pop(0)
        if rows:
            self._chunk = chunk
        changes = [self._read_change(table, row) for row in rows]
        if changes:
            changes[-1] = replace(changes[-1], is_last=True)
        if self._rows_of_snapshot != snapshot:
            self._rows_of_snapshot, self._rows_done = snapshot, 0
            self._rows_estimate = self._estimate(table)
        self._rows_done += len(rows)
        token = _Token(self._seen, snapshot_done=done)
        mark = chunk.mark()
        fits = bool(rows) and len(mark) <= FEED_MARK_BYTES_MAX  # else it begins anew after a crash
        return SourceBatch(
            changes, mark if fits else None, only, token, more=again or bool(self._pending) or more
        )

    def _rows_of(self, table: Table, chunk: _Chunk, *, bounded: bool) -> tuple[list[_Row], bool]:
        """The rows of a chunk, and whether there may be more behind it."""
        names = [quoted(column) for column in table.columns]
        rowid = "NULL" if table.rowid is None else table.rowid
        places = [rowid] if table.rowid is not None else [quoted(column) for column in table.key]
        place = f"({', '.join(places)})"
        holes = f"({', '.join('?' for _ in places)})"
        where, values = [], []
        if chunk.after is not None:
            where.append(f"{place} > {holes}")
            values += chunk.after
        if bounded and chunk.end is not None:
            where.append(f"{place} <= {holes}")
            values += chunk.end
        condition = f" WHERE {' AND '.join(where)}" if where else ""
        cursor = self._connection.execute(
            f"SELECT {rowid}, {', '.join(names)} FROM {quoted(table.name)}{condition}"
            f" ORDER BY {', '.join(places)}",
            values,
        )
        found: list[_Row] = []
        size = 0
        with contextlib.closing(cursor):
            for number, *columns in cursor:
                if not bounded and (len(found) >= self._rows_max or size > CHUNK_BYTES):
                    return found, True
                found.append(_Row(table, columns, number))
                size += _size_of(columns)
        return found, False

    def _read_change(self, table: Table, row: _Row) -> RowChange:
        """One row of a snapshot, above all that was given before it."""
        major = max(self._seen, self._floor[0])
        above = self._floor[1] if major == self._floor[0] else 1
        self._minor = max(self._minor, above) + 1
        self._floor = (major, self._minor)
        return RowChange(
            self._source(table),
            SNAPSHOT_OP,
            self._floor,
            _now_ms(),
            row.key,
            None,
            row.values,
        )

    def read_again(self, name: str) -> None:
        """Have a table's rows read once more."""
        schema = self._known_tables().get(name)
        if schema is None:
            raise SourceError(
                f"{self._name} has no table {name!r} that is captured; there are:"
                f" {', '.join(sorted(self._known_tables())[:10])}."
            )
        with self._writing():
            self._note(schema, _START)
        self._data_version = -1

    def progress(self) -> SnapshotProgress | None:
        """Of the table that is being read; asked from another thread, and no more than a look."""
        pending = list(self._pending)
        if not pending:
            return None
        number, table = pending[0]
        begun = self._rows_of_snapshot == number
        done, estimate = (self._rows_done, self._rows_estimate) if begun else (0, None)
        return SnapshotProgress(table.name, done, estimate, len(pending) - 1)

    def _estimate(self, table: Table) -> int | None:
        """The highest rowid is found at once; to count would take a look at every row."""
        if table.rowid is None:
            return None
        sql = f"SELECT max({table.rowid}) FROM {quoted(table.name)}"
        found = self._connection.execute(sql).fetchone()[0]
        return None if found is None else max(0, int(found))

    # ---- what is safe

    def confirm(self, token: _Token) -> None:
        """Remember it, and trim the log from time to time."""
        self._confirmed = max(self._confirmed, token.upto)
        if token.snapshot_done is not None:
            with self._writing():
                self._connection.execute(
                    f"UPDATE {SNAPSHOTS} SET done = 1 WHERE id = ?", (token.snapshot_done,)
                )
        self._trim(force=False)

    def _trim(self, *, force: bool) -> None:
        if self._confirmed <= self._trimmed:
            return
        due = time.monotonic() >= self._trim_at or self._confirmed - self._trimmed >= TRIM_ROWS
        if not due and not force:
            return
        self._connection.execute(f"PRAGMA busy_timeout = {TRIM_WAIT_MS}")
        try:
            self._delete_upto(self._confirmed)
        except sqlite3.OperationalError:
            pass  # a writer is at work; it is not urgent
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {int(BUSY_S * 1000)}")
        self._trim_at = time.monotonic() + TRIM_S

    def _delete_upto(self, upto: int) -> None:
        with self._writing():
            # A table whose reading the log had announced has it in its own row from now on.
            self._connection.execute(
                f"UPDATE {SNAPSHOTS} SET started = 1 WHERE id IN"
                f" (SELECT o_rowid FROM {LOG} WHERE id <= ? AND op = '{_START}')",
                (upto,),
            )
            # SQLite forgets to note the highest id when a statement ends half-way (INSERT OR FAIL);
            # without this, an id that was trimmed could be given again.
            self._connection.execute(
                "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (upto, LOG)
            )
            self._connection.execute(f"DELETE FROM {LOG} WHERE id <= ?", (upto,))
            self._set_state("trimmed", upto)
        self._trimmed = upto

    def close(self) -> None:
        """Trim what is confirmed, and close."""
        try:
            self._trim(force=True)
        finally:
            self._connection.close()

    # ---- the connection

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    def _state(self, key: str) -> Any:
        row = self._connection.execute(f"SELECT value FROM {STATE} WHERE key = ?", (key,))
        found = row.fetchone()
        return None if found is None else found[0]

    def _set_state(self, key: str, value: Any) -> None:
        self._connection.execute(f"INSERT OR REPLACE INTO {STATE} VALUES (?, ?)", (key, value))

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return self._transaction("BEGIN IMMEDIATE")

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        return self._transaction("BEGIN")

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._connection.execute(begin)
        try:
            yield
        except BaseException:
            self._connection.rollback()
            raise
        self._connection.commit()


class _Row:
    """One row of a table, with the number that it has there."""

    __slots__ = ("key", "rowid", "values")

    def __init__(self, table: Table, columns: Sequence[Any], rowid: int | None) -> None:
        self.rowid = rowid
        # A log that is wider than the table, or older than a column, ends elsewhere.
        self.values = dict(zip(table.columns, columns, strict=False))
        self.key = {name: self.values[name] for name in table.key}
        if table.rowid is not None and (not table.key or None in self.key.values()):
            self.key[table.rowid] = rowid

    def place(self, table: Table) -> Iterable[Any]:
        """Where it stands in the order in which a snapshot reads."""
        return [self.rowid] if table.rowid is not None else [self.values[c] for c in table.key]


def _size_of(columns: Sequence[Any]) -> int:
    return sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in columns)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
