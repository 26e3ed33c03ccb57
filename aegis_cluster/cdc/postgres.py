"""PostgreSQL as a source: a logical replication slot, read with `pgoutput`.

The idea: slot and publication are made on demand and named after the feed. The slot is created
together with an exported snapshot, so the rows that were there are read exactly as of the point
where the stream begins. A change's position is the LSN of its transaction's commit and its place
in there; the slot is confirmed up to the last commit that is in the feed, and on quiet tables up
to where the server has come, so that it never keeps log that nobody needs.

A snapshot that was broken off begins over, behind a truncate of each table. The feed's marks say
how far things are: `announced` (a slot of this name is ours), then `done`, with the server's own
identifier, so that another server is not taken for this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import select
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgpack

from aegis_cluster.cdc import pgoutput
from aegis_cluster.cdc.envelope import SNAPSHOT_OP, RowChange, encode_row_key
from aegis_cluster.cdc.events import ChangeSource
from aegis_cluster.cdc.pgoutput import TOASTED
from aegis_cluster.cdc.postgres_types import SESSION, TypeTable
from aegis_cluster.cdc.source import CHUNK_BYTES, ROWS_PER_BATCH_MAX, SourceBatch
from aegis_cluster.cdc.values import UNCHANGED
from aegis_cluster.errors import ConfigError, SourceError, SourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aegis_cluster.cdc.source import PartitionPoint

IDLE_S: Final = 0.5
WAIT_S: Final = 0.05
CONNECT_S: Final = 10
HEARTBEAT_S: Final = 1.0
"""The server is told so often how far the feed is."""
ANNOUNCED: Final = "announced"
DONE: Final = "done"

T = TypeVar("T")
log = logging.getLogger(__name__)


class PostgresLag(NamedTuple):
    """bytes: of the server's log that the slot still keeps. seconds: how long ago the transaction
    was committed that is being read; 0 where none is."""

    bytes: int
    seconds: float


class PostgresSource:
    """A database of a PostgreSQL server with `wal_level = logical`.

    dsn: `postgresql://user@host/database`; the user may log in with REPLICATION and owns the
    tables, or is a superuser. tables: names, with the schema where it is not `public`; None: all
    of the user's. name: of the feed; None: the database's.
    slot: of slot and publication; None: `aegis_` and the feed's name. on_lost_slot: `"stop"`, or
    `"snapshot"`: make a new one and read all rows again (after a `Truncate` of each table).

    Needs psycopg2: `pip install 'aegis-cluster[postgres]'`.
    """

    def __init__(
        self,
        dsn: str,
        *,
        tables: Sequence[str] | None = None,
        name: str | None = None,
        slot: str | None = None,
        on_lost_slot: str = "stop",
    ) -> None:
        if on_lost_slot not in ("stop", "snapshot"):
            raise ConfigError(
                f"on_lost_slot = {on_lost_slot!r}; allowed: 'stop', 'snapshot'.", key="on_lost_slot"
            )
        psycopg2 = _library()
        parts = psycopg2.extensions.parse_dsn(dsn)
        self._dsn = dsn
        self._tables = tables
        self._database_name = str(parts.get("dbname") or parts.get("user") or "postgres")
        self._name = name or self._database_name
        self._slot = slot or "aegis_" + re.sub(r"[^a-z0-9_]", "_", self._name.lower())[:50]
        self._on_lost_slot = on_lost_slot
        self._thread: ThreadPoolExecutor | None = None
        self._database: _Database | None = None

    @property
    def name(self) -> str:
        """Of the feed's topic."""
        return self._name

    async def open(self, feed: str, points: Sequence[PartitionPoint], rows_max: int) -> None:
        """See `Source.open`."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"cdc {self._name}")

        def start() -> None:
            self._database = _Database(
                self._dsn,
                self._database_name,
                slot=self._slot,
                tables=self._tables,
                again_if_lost=self._on_lost_slot == "snapshot",
                rows_max=max(1, min(rows_max, ROWS_PER_BATCH_MAX)),
            )
            self._database.start(points)

        await self._run(start)

    async def read(self) -> SourceBatch:
        """See `Source.read`."""
        database = self._opened()
        until = time.monotonic() + IDLE_S
        while True:
            batch = await self._run(database.read)
            if batch is not None or time.monotonic() >= until:
                return batch or SourceBatch(more=False)

    async def confirm(self, token: Any) -> None:
        """See `Source.confirm`."""
        database = self._opened()
        database.confirmed = max(
            database.confirmed, int(token)
        )  # told to the server by the next read

    async def lag(self) -> PostgresLag:
        """How far the feed is behind the server. Raises `SourceUnavailable`."""
        return await self._run(self._opened().lag)

    async def close(self) -> None:
        """See `Source.close`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return

        def end() -> None:
            database, self._database = self._database, None
            if database is not None:
                database.close()

        with contextlib.suppress(Exception):
            await asyncio.get_running_loop().run_in_executor(thread, end)
        thread.shutdown(wait=False)

    def _opened(self) -> _Database:
        if self._database is None:
            raise SourceError("This source is not open.")
        return self._database

    async def _run(self, work: Callable[[], T]) -> T:
        psycopg2 = _library()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except psycopg2.Error as error:
            raise _told(error, self._slot) from error


class _Table(NamedTuple):
    """A table of the stream, and how its values are read."""

    source: ChangeSource
    columns: tuple[str, ...]
    readers: tuple[Callable[[str], Any], ...]
    key: tuple[str, ...]
    told: frozenset[str]
    """What is told of an old row where only its identity is."""

    def row(self, values: Sequence[Any]) -> dict[str, Any]:
        return {
            name: UNCHANGED if value is TOASTED else None if value is None else read(value)
            for name, read, value in zip(self.columns, self.readers, values, strict=True)
        }

    def key_of(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in self.key}


class _Database:
    """Connections, in the one thread that uses them."""

    def __init__(
        self,
        dsn: str,
        name: str,
        *,
        slot: str,
        tables: Sequence[str] | None,
        again_if_lost: bool,
        rows_max: int,
    ) -> None:
        self.confirmed = 0
        self._dsn, self._name, self._slot = dsn, name, slot
        self._wanted, self._again_if_lost, self._rows_max = tables, again_if_lost, rows_max
        self._control = self._connect()
        self._control.autocommit = True
        self._stream: Any = None
        self._cursor: Any = None
        self._types = TypeTable()
        self._known_types: set[int] = set()
        self._tables: dict[int, _Table] = {}
        self._floor = (0, 0)
        self._is_void = False
        """The feed has rows that a snapshot before this one has left there."""
        self._snapshot: Iterator[SourceBatch] | None = None
        self._begin: pgoutput.Begin | None = None
        self._ordinal = 0
        self._end_lsn = 0
        self._told_lsn = 0
        self._told_at = 0.0

    def _connect(self, **more: Any) -> Any:
        return _library().connect(
            self._dsn,
            options=SESSION,
            connect_timeout=CONNECT_S,
            application_name="aegis cdc",
            **more,
        )

    def _ask(self, sql: str, *values: Any) -> list[Any]:
        with self._control.cursor() as cursor:
            cursor.execute(sql, values or None)
            return list(cursor.fetchall()) if cursor.description else []

    # ---- starting

    def start(self, points: Sequence[PartitionPoint]) -> None:
        """Go on with the stream, or begin with a snapshot."""
        ((level,),) = self._ask("SHOW wal_level")
        if level != "logical":
            raise SourceError(
                f"The server has wal_level = {level}; set it to logical in postgresql.conf (or by"
                " ALTER SYSTEM SET wal_level = logical) and restart the server."
            )
        ((server,),) = self._ask("SELECT system_identifier::text FROM pg_control_system()")
        marks = [msgpack.unpackb(point.mark) for point in points if point.mark]
        self._floor = max((point.position for point in points), default=(0, 0))
        done = next((mark for mark in marks if mark[0] == DONE), None)
        if done is not None and done[1] != server:
            raise SourceError(
                f"The feed was filled from another server than this one ({done[1]}, now {server})."
                " Give the source another name, so that it begins a feed of its own."
            )
        self._publish()
        slot = self._ask(
            "SELECT active_pid, wal_status FROM pg_replication_slots WHERE slot_name = %s",
            self._slot,
        )
        if slot and slot[0][0] is not None:
            raise SourceUnavailable(
                f"The slot {self._slot} is in use by the server's process {slot[0][0]}; waiting."
            )
        if slot and not marks:
            raise SourceError(
                f"The server has a slot {self._slot} and this feed is new: it may be another"
                " feed's. Give the source another name or slot, or drop it: SELECT"
                f" pg_drop_replication_slot('{self._slot}')."
            )
        lost = not slot or slot[0][1] == "lost"
        if done is not None and not lost:
            self._begin_stream()
            return
        if done is not None and not self._again_if_lost:
            raise SourceError(
                f"The slot {self._slot} is lost (dropped, or its log was removed), so changes are"
                " missing. Start the source with on_lost_slot='snapshot' to have all rows read"
                " again."
            )
        self._is_void = bool(marks)
        self._snapshot = self._snapshot_batches(server, drop=bool(slot))

    def _publish(self) -> None:
        """Have a publication of the tables that can be captured."""
        found = self._ask(
            "SELECT n.nspname, c.relname, c.relreplident, EXISTS (SELECT 1 FROM pg_index i WHERE"
            " i.indrelid = c.oid AND i.indisprimary), quote_ident(n.nspname) || '.' ||"
            " quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog',"
            " 'information_schema') AND n.nspname NOT LIKE 'pg\\_%%' ORDER BY 1, 2"
        )
        tables, seen = [], set()
        for schema, table, identity, has_key, quoted in found:
            names = {f"{schema}.{table}", table if schema == "public" else ""}
            if self._wanted is not None and not names & set(self._wanted):
                continue
            seen |= names
            if identity == "n" or (identity == "d" and not has_key):
                log.warning(
                    "Table %s has no primary key, so it is not captured: PostgreSQL would refuse"
                    " updates of it. To capture it: ALTER TABLE %s REPLICA IDENTITY FULL.",
                    quoted, quoted,
                )  # fmt: skip
                continue
            tables.append(quoted)
        missing = sorted(set(self._wanted or ()) - seen)
        if missing or not tables:
            which = f"no table {missing[0]!r}" if missing else "no table that can be captured"
            raise SourceError(f"The database {self._name} has {which}.")
        publication = _quoted(self._slot)
        exists = self._ask("SELECT 1 FROM pg_publication WHERE pubname = %s", self._slot)
        listed = ", ".join(tables)
        if exists:
            self._ask(f"ALTER PUBLICATION {publication} SET TABLE {listed}")
        else:
            self._ask(f"CREATE PUBLICATION {publication} FOR TABLE {listed}")

    def _begin_stream(self) -> None:
        extras = _library().extras
        self._stream = self._connect(connection_factory=extras.LogicalReplicationConnection)
        self._cursor = self._stream.cursor()
        self._cursor.start_replication(
            slot_name=self._slot,
            decode=False,
            options={"proto_version": "1", "publication_names": _quoted(self._slot)},
        )

    # ---- snapshot

    def _snapshot_batches(self, server: str, *, drop: bool) -> Iterator[SourceBatch]:
        """Announce it, make the slot, hand out all rows as of its begin, and say it is done."""
        place = _Place(*self._floor)
        yield SourceBatch(mark=msgpack.packb([ANNOUNCED, server]), position=place.next())
        if drop:
            self._ask("SELECT pg_drop_replication_slot(%s)", self._slot)
        extras = _library().extras
        making = self._connect(connection_factory=extras.LogicalReplicationConnection)
        reading = self._connect()
        try:
            with making.cursor() as cursor:
                cursor.execute(f"CREATE_REPLICATION_SLOT {_quoted(self._slot)} LOGICAL pgoutput")
                _, point, exported, _ = cursor.fetchone()
            start = _lsn(point) - 1  # below the commit of every change that follows
            if start <= self._floor[0]:
                raise SourceError(
                    f"The server's log is at {point}, behind what the feed has; it is not the"
                    " server that filled it. Give the source another name."
                )
            place = _Place(start, 0)
            reading.set_session(isolation_level="REPEATABLE READ", readonly=True)
            with reading.cursor() as cursor:
                cursor.execute("SET TRANSACTION SNAPSHOT %s", (exported,))
            making.close()
            yield from self._rows(reading, place)
        finally:
            making.close()
            reading.close()
        self._begin_stream()
        yield SourceBatch(mark=msgpack.packb([DONE, server]), position=place.next())

    def _rows(self, reading: Any, place: _Place) -> Iterator[SourceBatch]:
        extensions = _library().extensions
        raw = extensions.new_type(self._types.built_in, "RAW", lambda value, cursor: value)
        extensions.register_type(raw, reading)
        published = self._ask(
            "SELECT t.schemaname, t.tablename, c.oid FROM pg_publication_tables t JOIN pg_namespace"
            " n ON n.nspname = t.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND"
            " c.relname = t.tablename WHERE t.pubname = %s ORDER BY 1, 2",
            self._slot,
        )
        for schema, name, oid in published:
            source = ChangeSource(self._name, schema, name, "postgresql")
            if self._is_void:
                change = RowChange(source, "t", place.next(), _now_ms(), None)
                yield SourceBatch([change])
            key = self._primary_key(oid)
            with reading.cursor("rows") as cursor:
                cursor.itersize = self._rows_max
                names = ", ".join(map(_quoted, self._columns(oid)))
                cursor.execute(f"SELECT {names} FROM ONLY {_quoted(schema)}.{_quoted(name)}")
                yield from self._chunks(cursor, source, key, place)

    def _chunks(
        self, cursor: Any, source: ChangeSource, key: tuple[str, ...], place: _Place
    ) -> Iterator[SourceBatch]:
        changes: list[RowChange] = []
        table: _Table | None = None
        size, now_ms = 0, _now_ms()
        for values in cursor:
            if table is None:
                names = tuple(column.name for column in cursor.description)
                readers = tuple(self._reader(column.type_code) for column in cursor.description)
                table = _Table(source, names, readers, key, frozenset(key))
            row = table.row(values)
            changes.append(
                RowChange(source, SNAPSHOT_OP, place.next(), now_ms, table.key_of(row), None, row)
            )
            size += sum(len(value) for value in values if value is not None)
            if len(changes) >= self._rows_max or size >= CHUNK_BYTES:
                yield SourceBatch(changes)
                changes, size, now_ms = [], 0, _now_ms()
        if changes:
            yield SourceBatch(changes)

    def _columns(self, oid: int) -> list[str]:
        """Those that the stream has, too: not what is generated."""
        rows = self._ask(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT"
            " attisdropped AND attgenerated = '' ORDER BY attnum",
            oid,
        )
        return [name for (name,) in rows]

    def _primary_key(self, oid: int) -> tuple[str, ...]:
        rows = self._ask(
            "SELECT a.attname FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN"
            " pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey) WHERE"
            " i.indrelid = %s AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE"
            " i.indisprimary END ORDER BY array_position(i.indkey::int2[], a.attnum)",
            oid,
        )
        return tuple(name for (name,) in rows)

    def _reader(self, oid: int) -> Callable[[str], Any]:
        """How to read a type; those of the database's own are asked for once."""
        if oid not in self._known_types and oid >= 16_384:
            self._known_types.add(oid)
            for base, element, category in self._ask(
                "SELECT typbasetype, typelem, typcategory FROM pg_type WHERE oid = %s", oid
            ):
                for other in filter(None, (base, element)):
                    self._reader(other)
                self._types.add(oid, base=base, element=element if category == "A" else 0)
        return self._types.converter(oid)

    # ---- stream

    def read(self) -> SourceBatch | None:
        """The next batch; None where nothing came for a moment."""
        if self._snapshot is not None:
            batch = next(self._snapshot, None)
            if batch is not None:
                return batch
            self._snapshot = None
        self._tell()
        changes: list[RowChange] = []
        size = 0
        while len(changes) < self._rows_max and size < CHUNK_BYTES:
            message = self._cursor.read_message()
            if message is None:
                if changes or not select.select([self._stream], [], [], WAIT_S)[0]:
                    break
                continue
            size += len(message.payload)
            changes.extend(self._decoded(message.payload))
        if self._begin is None and not changes:
            # All that was sent has been handed out; where the server has come to, nothing is ours.
            self._end_lsn = max(self._end_lsn, self._cursor.wal_end or 0)
        if not changes and self._end_lsn <= self.confirmed:
            return None
        return SourceBatch(changes, token=self._end_lsn, more=bool(changes))

    def _tell(self) -> None:
        """Let the server forget what the feed has."""
        moved = self.confirmed > self._told_lsn
        if moved and time.monotonic() >= self._told_at + HEARTBEAT_S:
            self._cursor.send_feedback(
                write_lsn=self.confirmed, flush_lsn=self.confirmed, force=True
            )
            self._told_lsn, self._told_at = self.confirmed, time.monotonic()

    def _decoded(self, data: bytes) -> Iterator[RowChange]:
        match pgoutput.decode(data):
            case pgoutput.Begin() as begin:
                self._begin, self._ordinal = begin, 0
            case pgoutput.Commit(end_lsn=lsn):
                self._begin, self._end_lsn = None, lsn
            case pgoutput.Relation() as relation:
                self._tables[relation.oid] = self._described(relation)
            case pgoutput.RowInsert(relation=oid, new=new):
                table = self._tables[oid]
                row = table.row(new)
                yield self._change(table, "c", table.key_of(row), None, row)
            case pgoutput.RowDelete(relation=oid, old=old, key_only=key_only):
                table = self._tables[oid]
                row = _narrowed(table, table.row(old), key_only=key_only)
                yield self._change(table, "d", table.key_of(row), row, None)
            case pgoutput.RowUpdate() as update:
                yield from self._updated(update)
            case pgoutput.TableTruncate(relations=relations):
                for oid in relations:
                    yield self._change(self._tables[oid], "t", None, None, None)

    def _updated(self, update: pgoutput.RowUpdate) -> Iterator[RowChange]:
        """One change, or two where the key has changed."""
        table = self._tables[update.relation]
        new = table.row(update.new)
        if update.old is None:
            yield self._change(table, "u", table.key_of(new), None, new)
            return
        old = _narrowed(table, table.row(update.old), key_only=update.key_only)
        for name, value in old.items():
            if new[name] is UNCHANGED:
                new[name] = value
        before, after = table.key_of(old), table.key_of(new)
        if encode_row_key(before) != encode_row_key(after):
            yield self._change(table, "d", before, old, None)
            yield self._change(table, "c", after, None, new)
        else:
            yield self._change(table, "u", after, None if update.key_only else old, new)

    def _change(
        self,
        table: _Table,
        op: str,
        key: dict[str, Any] | None,
        before: dict[str, Any] | None,
        after: dict[str, Any] | None,
    ) -> RowChange:
        begin = self._begin
        if begin is None:
            raise SourceError("PostgreSQL sent a change outside of any transaction.")
        position = (begin.lsn, self._ordinal)
        self._ordinal += 1
        xid = str(begin.xid)
        return RowChange(table.source, op, position, begin.time_ms, key, before, after, xid)

    def _described(self, relation: pgoutput.Relation) -> _Table:
        columns = relation.columns
        told = tuple(column.name for column in columns if column.is_key)
        is_full = relation.identity == "f"
        return _Table(
            ChangeSource(self._name, relation.schema, relation.table, "postgresql"),
            tuple(column.name for column in columns),
            tuple(self._reader(column.type_oid) for column in columns),
            self._primary_key(relation.oid) if is_full else told,
            frozenset(told),
        )

    # ---- the rest

    def lag(self) -> PostgresLag:
        """Asked of the server."""
        ((kept,),) = self._ask(
            "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::int8 FROM"
            " pg_replication_slots WHERE slot_name = %s",
            self._slot,
        ) or ((0,),)
        behind = self._begin.time_ms if self._begin is not None else _now_ms()
        return PostgresLag(max(0, kept or 0), max(0.0, (_now_ms() - behind) / 1000))

    def close(self) -> None:
        """Tell the server what is safe, and go."""
        try:
            if self._snapshot is not None:
                self._snapshot.close()  # type: ignore[attr-defined] # a generator
            if self._cursor is not None and self.confirmed > self._told_lsn:
                self._cursor.send_feedback(flush_lsn=self.confirmed, force=True)
        finally:
            for connection in (self._stream, self._control):
                if connection is not None:
                    connection.close()


class _Place:
    """Positions that rise within one LSN."""

    def __init__(self, major: int, minor: int) -> None:
        self._major, self._minor = major, minor

    def next(self) -> tuple[int, int]:
        self._minor += 1
        return self._major, self._minor


def _narrowed(table: _Table, row: dict[str, Any], *, key_only: bool) -> dict[str, Any]:
    return {name: row[name] for name in table.columns if name in table.told} if key_only else row


def _library() -> Any:
    try:
        import psycopg2
        import psycopg2.extensions
        import psycopg2.extras
    except ImportError as error:
        raise SourceError(
            "PostgreSQL needs psycopg2: pip install 'aegis-cluster[postgres]'."
        ) from error
    return psycopg2


def _told(error: Any, slot: str) -> SourceError | SourceUnavailable:
    """What to do about it, as far as the error tells."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    code = error.pgcode or ""
    if code == "42501" or "permission denied" in text:
        return SourceError(
            f"PostgreSQL refused: {text}. The user needs REPLICATION (ALTER ROLE … REPLICATION),"
            " CREATE on the database, and to own the tables."
        )
    if code == "55006":
        return SourceUnavailable(f"The slot {slot} is in use: {text}")
    lasting = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password")
    if code[:2] in ("28", "3D", "42") or any(word in text for word in lasting):
        return SourceError(f"PostgreSQL refused: {text}. Check the address of the database.")
    if code == "53400" or "all replication slots are in use" in text:
        return SourceError(f"{text}; raise max_replication_slots, or drop one that nobody uses.")
    return SourceUnavailable(f"PostgreSQL does not answer: {text}")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
