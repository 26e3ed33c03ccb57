"""The way back: a feed's changes, applied to another database exactly once.

The idea: the changes of a poll and the offsets behind them go into the target in one transaction of
the target's, so both are there or neither. After a crash reading begins at what the target says.
Two mirrors of one feed into one target at once do no harm: each transaction first locks the row of
its offsets, and one whose changes are there already is given up.

A row is written by its key: an insert of a key that is there replaces the row, so the rows of a
snapshot, which may come after their changes, do no harm. Rows without a key are counted: a delete
takes one row that is equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from aegis_cluster.cdc.envelope import change_from, encode_row_key
from aegis_cluster.cdc.events import Delete, Insert, Truncate, Update
from aegis_cluster.cdc.values import UNCHANGED
from aegis_cluster.errors import AegisError, Misuse, SourceError, SourceUnavailable
from aegis_cluster.message import Offset
from aegis_cluster.subscribe_config import SubscribeConfig
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from aegis_cluster.cdc.events import ChangeEvent
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.message import ReceivedMessage

POLL_RECORDS: Final = 2_000
LOOK_S: Final = 0.5
PAUSE_S: Final = 1.0
HOLE: Final = "\0"
"""Stands for a value; no identifier has it in it."""
OFFSETS: Final = "aegis_cdc_offsets"
"""The table of the target that says how far each feed is applied."""


class Target(Protocol):
    """A database that changes are applied to. One thread uses it; all may raise `SourceError`,
    `SourceUnavailable`."""

    def open(self) -> None:
        """Connect, and have the table of offsets."""

    def offsets(self, feed: str) -> dict[int, int]:
        """By partition, the next offset to be applied."""

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """All or nothing."""

    def lock_offset(self, feed: str, partition: int) -> int:
        """The same of one partition, inside a transaction; no other mirror moves it meanwhile."""

    def move_offset(self, feed: str, partition: int, offset: int) -> None: ...

    def prepare(self, table: str, columns: Sequence[str], key: Sequence[str]) -> None:
        """Have a table that can take such rows, or say why not."""

    def named(self, table: str) -> str:
        """As SQL names it."""

    def primary_key(self, table: str) -> tuple[str, ...] | None:
        """Its columns; none in a table without one; None where there is no such table."""

    def bound(self, table: str, row: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        """What stands for each value in SQL, and the values as the target takes them."""

    def execute(self, sql: str, values: Sequence[Any]) -> None:
        """`HOLE` stands for a value."""

    def delete_equal(self, table: str, row: Mapping[str, Any]) -> None:
        """One row that is equal in all columns."""

    def keys(self, table: str, key: Sequence[str]) -> list[tuple[Any, ...]]: ...

    def close(self) -> None: ...


def quoted(name: str) -> str:
    """An identifier, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


class SQLiteTarget:
    """A database file, made where it is not there.

    Its tables are made on demand, with columns that keep each value as it is; columns that come
    later are added. What SQLite has no type for (exact numbers, moments, lists) is kept as text.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._known: dict[str, set[str]] = {}

    @property
    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise Misuse("This target is not open.")
        return self._connection

    def open(self) -> None:
        """See `Target`."""
        self._known.clear()
        with self._told():
            self._connection = sqlite3.connect(
                self._path, isolation_level=None, timeout=10, check_same_thread=False
            )
            self._connection.execute(
                f"CREATE TABLE IF NOT EXISTS {OFFSETS} (feed TEXT, partition INTEGER,"
                " next INTEGER NOT NULL, PRIMARY KEY (feed, partition))"
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise SourceUnavailable(f"{self._path} is locked by another process.") from error
            raise SourceError(f"SQLite cannot write {self._path}: {error}.") from error
        except sqlite3.Error as error:
            raise SourceError(f"SQLite refused a change in {self._path}: {error}.") from error

    def offsets(self, feed: str) -> dict[int, int]:
        """See `Target`."""
        with self._told():
            rows = self._open.execute(
                f"SELECT partition, next FROM {OFFSETS} WHERE feed = ?", (feed,)
            )
            return dict(rows.fetchall())

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See `Target`."""
        with self._told():
            self._open.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._open.rollback()
                self._known.clear()
                raise
            self._open.commit()

    def lock_offset(self, feed: str, partition: int) -> int:
        """See `Target`; the transaction is the only writer."""
        return self.offsets(feed).get(partition, 0)

    def move_offset(self, feed: str, partition: int, offset: int) -> None:
        """See `Target`."""
        self._open.execute(
            f"INSERT OR REPLACE INTO {OFFSETS} VALUES (?, ?, ?)", (feed, partition, offset)
        )

    def prepare(self, table: str, columns: Sequence[str], key: Sequence[str]) -> None:
        """See `Target`."""
        known = self._known.get(table)
        if known is None:
            listed = [quoted(column) for column in columns]
            if key and set(key) <= set(columns):  # not where it is SQLite's own number of the row
                listed.append(f"PRIMARY KEY ({', '.join(map(quoted, key))})")
            if listed:
                body = ", ".join(listed)
                self._open.execute(f"CREATE TABLE IF NOT EXISTS {quoted(table)} ({body})")
            rows = self._open.execute(f"PRAGMA table_info({quoted(table)})").fetchall()
            known = self._known[table] = {row[1] for row in rows}
        for column in columns:
            if column not in known:
                self._open.execute(f"ALTER TABLE {quoted(table)} ADD COLUMN {quoted(column)}")
                known.add(column)

    def named(self, table: str) -> str:
        """See `Target`."""
        return quoted(table)

    def primary_key(self, table: str) -> tuple[str, ...] | None:
        """See `Target`."""
        rows = self._open.execute(f"PRAGMA table_info({quoted(table)})").fetchall()
        key = tuple(row[1] for row in sorted(rows, key=lambda row: row[5]) if row[5])
        return key if rows else None

    def bound(self, table: str, row: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        """See `Target`."""
        return [HOLE] * len(row), [_for_sqlite(value) for value in row.values()]

    def execute(self, sql: str, values: Sequence[Any]) -> None:
        """See `Target`."""
        self._open.execute(sql.replace(HOLE, "?"), values)

    def delete_equal(self, table: str, row: Mapping[str, Any]) -> None:
        """See `Target`."""
        where = " AND ".join(f"{quoted(name)} IS {HOLE}" for name in row)
        self.execute(
            f"DELETE FROM {quoted(table)} WHERE rowid IN (SELECT rowid FROM {quoted(table)}"
            f" WHERE {where} LIMIT 1)",
            self.bound(table, row)[1],
        )

    def keys(self, table: str, key: Sequence[str]) -> list[tuple[Any, ...]]:
        """See `Target`."""
        listed = ", ".join(map(quoted, key))
        return self._open.execute(f"SELECT {listed} FROM {quoted(table)}").fetchall()

    def close(self) -> None:
        """See `Target`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _for_sqlite(value: Any) -> Any:
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


class PostgresTarget:
    """A database of a PostgreSQL server. Its tables have to be there, with the same names and
    columns and with a primary key (or unique constraint) on the same ones; `schema` is where.

    Needs psycopg2: `pip install 'aegis-cluster[postgres]'`.
    """

    def __init__(self, dsn: str, *, schema: str = "public") -> None:
        self._dsn, self._schema = dsn, schema
        self._connection: Any = None
        self._known: dict[str, tuple[dict[str, str], frozenset[str]]] = {}
        """Of each table, the type of each column, and those that are unique."""

    def open(self) -> None:
        """See `Target`."""
        from aegis_cluster.cdc.postgres import library

        self._known.clear()
        with self._told():
            self._connection = library().connect(
                self._dsn, connect_timeout=10, application_name="aegis cdc mirror"
            )
            with self._connection, self._connection.cursor() as cursor:
                cursor.execute(
                    f"CREATE TABLE IF NOT EXISTS {self.named(OFFSETS)} (feed text, partition int,"
                    " next bigint NOT NULL, PRIMARY KEY (feed, partition))"
                )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        from aegis_cluster.cdc.postgres import library

        try:
            yield
        except library().Error as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            if error.pgcode is None or error.pgcode[:2] in ("08", "57", "53", "40"):
                raise SourceUnavailable(f"The target does not answer: {text}") from error
            raise SourceError(f"The target refused a change: {text}.") from error

    def named(self, table: str) -> str:
        """See `Target`."""
        return f"{quoted(self._schema)}.{quoted(table)}"

    def _ask(self, sql: str, *values: Any) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, values or None)
            return list(cursor.fetchall())

    def offsets(self, feed: str) -> dict[int, int]:
        """See `Target`."""
        with self._told(), self._connection:
            table = self.named(OFFSETS)
            return dict(self._ask(f"SELECT partition, next FROM {table} WHERE feed = %s", feed))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """See `Target`."""
        with self._told(), self._connection:
            yield

    def lock_offset(self, feed: str, partition: int) -> int:
        """See `Target`."""
        table = self.named(OFFSETS)
        with self._connection.cursor() as cursor:
            cursor.execute(
                f"INSERT INTO {table} VALUES (%s, %s, 0) ON CONFLICT DO NOTHING", (feed, partition)
            )
        ((found,),) = self._ask(
            f"SELECT next FROM {table} WHERE feed = %s AND partition = %s FOR UPDATE",
            feed, partition,
        )  # fmt: skip
        return int(found)

    def move_offset(self, feed: str, partition: int, offset: int) -> None:
        """See `Target`."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                f"UPDATE {self.named(OFFSETS)} SET next = %s WHERE feed = %s AND partition = %s",
                (offset, feed, partition),
            )

    def prepare(self, table: str, columns: Sequence[str], key: Sequence[str]) -> None:
        """See `Target`."""
        if table not in self._known:
            found = self._ask(
                "SELECT attname, format_type(atttypid, atttypmod), EXISTS (SELECT 1 FROM pg_index"
                " WHERE indrelid = attrelid AND indisunique AND attnum = ANY (indkey))"
                " FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0"
                " AND NOT attisdropped",
                self.named(table),
            )
            unique = frozenset(name for name, _, is_unique in found if is_unique)
            self._known[table] = {name: kind for name, kind, _ in found}, unique
        names, unique = self._known[table]
        missing = [column for column in (*columns, *key) if column not in names]
        if missing or not set(key) <= unique:
            del self._known[table]  # looked at again at the next try
        if not names:
            raise SourceError(
                f"The target has no table {self.named(table)}; make it (pg_dump --schema-only of"
                " the source, say), and start again."
            )
        if missing:
            raise SourceError(
                f"The target's table {self.named(table)} has no column {missing[0]!r}; add it,"
                " and start again."
            )
        if not set(key) <= unique:
            raise SourceError(
                f"The target's table {self.named(table)} has no primary key on"
                f" {', '.join(key)}; add one, and start again."
            )

    def primary_key(self, table: str) -> tuple[str, ...] | None:
        """See `Target`."""
        rows = self._ask(
            "SELECT a.attname FROM pg_class c LEFT JOIN pg_index i ON i.indrelid = c.oid AND"
            " i.indisprimary LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY"
            " (i.indkey) WHERE c.oid = to_regclass(%s)"
            " ORDER BY array_position(i.indkey::int2[], a.attnum)",
            self.named(table),
        )
        return tuple(name for (name,) in rows if name is not None) if rows else None

    def bound(self, table: str, row: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        """See `Target`."""
        types = self._known[table][0]
        values = [_for_postgres(value, types[name]) for name, value in row.items()]
        return [f"{HOLE}::{types[name]}" for name in row], values

    def execute(self, sql: str, values: Sequence[Any]) -> None:
        """See `Target`."""
        with self._connection.cursor() as cursor:
            cursor.execute(sql.replace("%", "%%").replace(HOLE, "%s"), values)

    def delete_equal(self, table: str, row: Mapping[str, Any]) -> None:
        """See `Target`."""
        holes, values = self.bound(table, row)
        where = " AND ".join(
            f"{quoted(name)}::text IS NOT DISTINCT FROM ({hole})::text"
            for name, hole in zip(row, holes, strict=True)
        )
        self.execute(
            f"DELETE FROM {self.named(table)} WHERE ctid IN (SELECT ctid FROM"
            f" {self.named(table)} WHERE {where} LIMIT 1)",
            values,
        )

    def keys(self, table: str, key: Sequence[str]) -> list[tuple[Any, ...]]:
        """See `Target`."""
        return self._ask(f"SELECT {', '.join(map(quoted, key))} FROM {self.named(table)}")

    def close(self) -> None:
        """See `Target`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _for_postgres(value: Any, kind: str) -> Any:
    if value is not None and kind in ("json", "jsonb"):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if isinstance(value, UUID) else value


class Mirror:
    """Applies a feed to a target while it is entered; an async context manager.

    applied: changes since it was entered.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        feed: str,
        target: Target,
        wanted: Callable[[ChangeEvent], bool],
    ) -> None:
        self.applied = 0
        self._engine, self._feed, self._target, self._wanted = engine, feed, target, wanted
        self._thread: ThreadPoolExecutor | None = None
        self._running: asyncio.Task[None] | None = None
        self._next: dict[int, int] = {}
        self._partitions = 1
        self._moved = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Raises `SourceError` and `SourceUnavailable` where the target cannot be opened."""
        if self._running is not None:
            raise Misuse("This mirror is in use already.")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"cdc mirror {self._feed}")
        try:
            self._next = await self._do(self._opened)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self._running = asyncio.create_task(self._run(), name=f"cdc mirror {self._feed}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop; what was applied stays."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(thread, self._target.close)
            thread.shutdown(wait=False)

    async def stopped(self) -> None:
        """Wait for the end. Raises why it has ended: what the target refused."""
        if self._running is not None:
            await asyncio.wait([self._running])
            if not self._running.cancelled():
                self._running.result()

    async def caught_up(self) -> None:
        """Wait until all that the feed has now is applied. Raises as `stopped` does."""
        ends = await self._engine.offsets(self._feed)
        while any(self._next.get(n, 0) < found.high_watermark for n, found in ends.items()):
            if self._running is None or self._running.done():
                await self.stopped()
                raise Misuse("This mirror has ended.")
            self._moved.clear()
            waiting = asyncio.ensure_future(self._moved.wait())
            await asyncio.wait([waiting, self._running], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

    async def _do(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _opened(self) -> dict[int, int]:
        self._target.open()
        return self._target.offsets(self._feed)

    async def _run(self) -> None:
        """Begin again where the target is after whatever passes by itself."""
        while True:
            try:
                await self._follow()
            except SourceUnavailable:
                await asyncio.sleep(PAUSE_S)
            except AegisError as error:
                if not error.retriable:
                    raise
                await asyncio.sleep(PAUSE_S)
            with contextlib.suppress(SourceUnavailable):
                await self._do(self._target.close)
                self._next = await self._do(self._opened)

    async def _follow(self) -> None:
        self._partitions = len(await self._engine.offsets(self._feed))
        reading = SubscribeConfig(start=Offset.EARLIEST)
        async with self._engine.subscribe(self._feed, reading) as subscriber:
            for partition, offset in self._next.items():
                await subscriber.seek(partition, Offset.at(offset))
            while True:
                messages = await subscriber.poll(POLL_RECORDS, timeout=LOOK_S)
                if messages:
                    await self._do(partial(self._apply, messages))
                    self._moved.set()

    def _apply(self, messages: Sequence[ReceivedMessage]) -> None:
        """One transaction."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for message in messages:
            first.setdefault(message.partition, message.offset)
            last[message.partition] = message.offset + 1
        applied = 0
        with self._target.transaction():
            for partition in sorted(first):
                have = self._target.lock_offset(self._feed, partition)
                if have > first[partition]:
                    raise SourceUnavailable(
                        f"Another mirror of {self._feed} has come to offset {have} of partition"
                        f" {partition}; going on from there."
                    )
            for message in messages:
                change = change_from(message)
                if change is not None and self._wanted(change):
                    self._change(change)
                    applied += 1
            for partition, offset in last.items():
                self._target.move_offset(self._feed, partition, offset)
        self._next.update(last)
        self.applied += applied

    # ---- one change

    def _change(self, change: ChangeEvent) -> None:
        target, table, key = self._target, change.source.table, change.key or {}
        if isinstance(change, Truncate):
            self._empty(change)
            return
        row = change.new_row if isinstance(change, (Insert, Update)) else {}
        old = change.old_row or {} if isinstance(change, (Update, Delete)) else {}
        target.prepare(table, [*(row or old)], [*key])
        if not key:
            if isinstance(change, (Update, Delete)):
                target.delete_equal(table, old)
            if isinstance(change, (Insert, Update)):
                self._insert(table, change.new_row)
        elif isinstance(change, Delete):
            self._delete(table, key)
        elif key.keys() <= row.keys():
            self._insert(table, row, key)
        else:
            self._delete(table, key)
            self._insert(table, {**key, **row})

    def _delete(self, table: str, key: Mapping[str, Any]) -> None:
        holes, values = self._target.bound(table, key)
        where = " AND ".join(
            f"{quoted(name)} = {hole}" for name, hole in zip(key, holes, strict=True)
        )
        self._target.execute(f"DELETE FROM {self._target.named(table)} WHERE {where}", values)

    def _insert(self, table: str, row: Mapping[str, Any], key: Iterable[str] = ()) -> None:
        """key: a row that has the same one is replaced, but for what was not told."""
        known = {name: value for name, value in row.items() if value is not UNCHANGED}
        holes, values = self._target.bound(table, known)
        names = ", ".join(map(quoted, known))
        sql = f"INSERT INTO {self._target.named(table)} ({names}) VALUES ({', '.join(holes)})"
        if key:
            others = [quoted(name) for name in known if name not in key]
            setting = ", ".join(f"{name} = excluded.{name}" for name in others)
            doing = f"UPDATE SET {setting}" if setting else "NOTHING"
            sql += f" ON CONFLICT ({', '.join(map(quoted, key))}) DO {doing}"
        self._target.execute(sql, values)

    def _empty(self, change: ChangeEvent) -> None:
        """Of the rows of its partition: in a feed with several, each has its own truncate."""
        table, target = change.source.table, self._target
        key = target.primary_key(table)
        if key is None:
            return  # nothing was ever applied to it
        if self._partitions == 1:
            target.execute(f"DELETE FROM {target.named(table)}", ())
            return
        if not key and change.source.connector == "sqlite":
            key = ("rowid",)
        if not key:
            if partition_for(b"", self._partitions) == change.partition:
                target.execute(f"DELETE FROM {target.named(table)}", ())
            return
        target.prepare(table, (), ())
        for values in target.keys(table, key):
            row = dict(zip(key, values, strict=True))
            if partition_for(encode_row_key(row), self._partitions) == change.partition:
                self._delete(table, row)
