"""PostgreSQL as a source: a logical replication slot, read with `pgoutput`.

The idea: slot and publication are made on demand and named after the feed. The stream begins first;
the rows that were there are read in chunks between its transactions (`postgres_snapshot`), so that
a snapshot goes on where it was after any crash, and can be made of one table at any time. The slot
is confirmed up to the last commit that is in the feed, and on quiet tables up to where the server
has come, so that it never keeps log that nobody needs.

The feed's marks say how far snapshots are, with the server's own identifier, so that another server
is not taken for this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import select
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from aegis_cluster.cdc.envelope import SNAPSHOT_OP
from aegis_cluster.cdc.events import ChangeSource
from aegis_cluster.cdc.postgres_rows import Moment, TableRows, copied
from aegis_cluster.cdc.postgres_snapshot import (
    ANNOUNCED,
    ASKED_MAX,
    DONE,
    EMPTY,
    FORGET,
    READ,
    READING,
    Asked,
    Chunk,
    Progress,
    Seen,
    Target,
    Window,
)
from aegis_cluster.cdc.postgres_stream import PREFIX, ChangeStream
from aegis_cluster.cdc.postgres_types import SESSION, TypeTable
from aegis_cluster.cdc.progress import SnapshotProgress
from aegis_cluster.cdc.source import CHUNK_BYTES, ROWS_PER_BATCH_MAX, SourceBatch
from aegis_cluster.errors import ConfigError, SourceError, SourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aegis_cluster.cdc.envelope import EncodedChange
    from aegis_cluster.cdc.pgoutput import Relation
    from aegis_cluster.cdc.source import PartitionPoint

IDLE_S: Final = 0.5
WAIT_S: Final = 0.05
LINGER_S: Final = 0.001
"""So long after some changes, others may join them."""
CONNECT_S: Final = 10
HEARTBEAT_S: Final = 1.0
"""The server is told so often how far the feed is."""
LOOK_S: Final = 5.0
"""From one look at which tables there are to the next."""
AGAIN_S: Final = 0.02
ROWS_AT_FIRST: Final = 200
"""Of the first chunk of a table; later ones are as large as its rows allow."""
LINES_BYTES_MAX: Final = 32 << 20
"""A chunk that is larger is read again, with fewer rows."""
PAGE_BYTES: Final = 8192
OLDEST: Final = 14
LOCK_MS: Final = 200
"""Nobody waits behind us for longer, and we wait for nobody: whoever alters a table comes first."""
SLOT_MS: Final = 20_000
"""To make a slot may take so long; then it is tried again."""

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
        psycopg2 = library()
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
                feed=self._name,
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
        if isinstance(token, _Token):
            self._opened().confirm(token)

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

    async def snapshot(self, table: str) -> None:
        """See `Source.snapshot`."""
        database = self._opened()
        asked = await self._run(lambda: database.ask_for(table))
        while not database.has_asked(asked):  # noqa: ASYNC110 - the other thread has no event
            await asyncio.sleep(WAIT_S)

    def progress(self) -> SnapshotProgress | None:
        """See `Source.progress`."""
        database = self._database
        return None if database is None else database.progress()

    def _opened(self) -> _Database:
        if self._database is None:
            raise SourceError("This source is not open.")
        return self._database

    async def _run(self, work: Callable[[], T]) -> T:
        psycopg2 = library()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except psycopg2.Error as error:
            raise _told(error, self._slot) from error
        except OSError as error:
            raise SourceUnavailable(
                f"A transaction that is not at its end could not be kept in a file: {error}. Make"
                " room in the directory for temporary files (TMPDIR)."
            ) from error


class _Token(NamedTuple):
    """What a batch confirms: the server's log up to an LSN, and the feed's mark of a number."""

    lsn: int
    mark: int


class _Database:
    """Connections, in the one thread that uses them."""

    def __init__(
        self,
        dsn: str,
        name: str,
        *,
        feed: str,
        slot: str,
        tables: Sequence[str] | None,
        again_if_lost: bool,
        rows_max: int,
    ) -> None:
        self._dsn, self._name, self._feed, self._slot = dsn, name, feed, slot
        self._wanted, self._again_if_lost, self._rows_max = tables, again_if_lost, rows_max
        self._confirmed = _Token(0, 0)
        self._control = self._connect()
        self._control.autocommit = True
        self._replication: Any = None
        self._cursor: Any = None
        self._reading: Any = None
        self._types = TypeTable()
        self._known_types: set[int] = set()
        self._stream = ChangeStream(self._described)
        self._batches: deque[SourceBatch] = deque()
        self._wishes: deque[Asked] = deque()
        self._is_settled = False
        """The stream is beyond all that the feed has, so positions of our own may follow."""
        self._position = (0, 0)
        """The highest that was given out, or that the feed has."""
        self._progress = Progress("")
        self._void = self._drop = False
        self._is_virgin = False
        """The feed has nothing but what we have read ourselves."""
        self._warned: set[str] = set()
        self._names_seen: set[str] = set()
        self._target: Target | None = None
        self._whole: Iterator[SourceBatch] | None = None
        self._chunk: Chunk | None = None
        self._lacking: frozenset[int] = frozenset()
        self._rows_next = ROWS_AT_FIRST
        self._publicated: dict[tuple[str, str], int] = {}
        self._look_at = 0.0
        self._told_lsn = 0
        self._told_at = 0.0
        self._wal_end = 0

    def _connect(self, **more: Any) -> Any:
        return library().connect(
            self._dsn,
            options=f"{SESSION} -c lock_timeout={LOCK_MS}",
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
        """Go on with stream and snapshots, or begin with a slot of our own."""
        self._check_server()
        ((server,),) = self._ask("SELECT system_identifier::text FROM pg_control_system()")
        self._position = max((point.position for point in points), default=(0, 0))
        progress, self._lacking = Progress.found(points, server)
        slot = self._ask(
            "SELECT active_pid, wal_status FROM pg_replication_slots WHERE slot_name = %s",
            self._slot,
        )
        if slot and slot[0][0] is not None:
            raise SourceUnavailable(
                f"The slot {self._slot} is in use by the server's process {slot[0][0]}; waiting."
            )
        if slot and progress is None:
            raise SourceError(
                f"The server has a slot {self._slot} and this feed is new: it may be another"
                " feed's. Give the source another name or slot, or drop it: SELECT"
                f" pg_drop_replication_slot('{self._slot}')."
            )
        lost = not slot or slot[0][1] == "lost"
        is_new = progress is None or progress.stage == ANNOUNCED
        if not is_new and lost and not self._again_if_lost:
            raise SourceError(
                f"The slot {self._slot} is lost (dropped, or its log was removed), so changes are"
                " missing. Start the source with on_lost_slot='snapshot' to have all rows read"
                " again."
            )
        self._publish()
        if progress is not None and not is_new and not lost:
            self._progress = progress
            self._begin_stream()
            return
        self._progress = Progress(server, number=0 if progress is None else progress.number)
        self._batches.append(self._moved())  # the slot is made once the feed has this
        self._void = progress is not None
        self._is_virgin = not self._void
        self._drop = bool(slot)

    def _check_server(self) -> None:
        ((level,), (version,)) = (
            self._ask("SHOW wal_level")[0],
            self._ask("SHOW server_version_num")[0],
        )
        if level != "logical":
            raise SourceError(
                f"The server has wal_level = {level}; set it to logical in postgresql.conf (or by"
                " ALTER SYSTEM SET wal_level = logical) and restart the server."
            )
        if int(version) < OLDEST * 10_000:
            raise SourceError(
                f"PostgreSQL {int(version) // 10_000} is too old to capture changes; {OLDEST} will"
                " do."
            )

    def _make_slot(self) -> None:
        """Make it, say that what the feed may have is void, and begin to read."""
        if self._drop:
            self._ask("SELECT pg_drop_replication_slot(%s)", self._slot)
        # It waits for all transactions that are open.
        self._ask(f"SET statement_timeout = {SLOT_MS}")
        ((point,),) = self._ask(
            "SELECT lsn::text FROM pg_create_logical_replication_slot(%s, 'pgoutput')", self._slot
        )
        self._ask("SET statement_timeout = 0")
        start = _lsn(point) - 1  # below the commit of every change that follows
        if start <= self._position[0]:
            raise SourceError(
                f"The server's log is at {point}, behind what the feed has; it is not the"
                " server that filled it. Give the source another name."
            )
        self._position, self._is_settled = (start, 0), True
        if self._void:
            changes = [
                self._rows_of(oid, schema, table).truncate(self._next(), self._now())
                for (schema, table), oid in sorted(self._publicated.items())
            ]
            self._batches.append(SourceBatch(changes))
        self._progress.stage = READING
        self._batches.append(self._moved())
        self._begin_stream()

    def _begin_stream(self) -> None:
        extras = library().extras
        self._replication = self._connect(connection_factory=extras.LogicalReplicationConnection)
        self._cursor = self._replication.cursor()
        self._cursor.start_replication(
            slot_name=self._slot,
            decode=False,
            options={
                "proto_version": "2",
                "publication_names": _quoted(self._slot),
                "streaming": "true",
                "messages": "true",
            },
        )
        waiting = self._ask(
            "SELECT backend_xid::text FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND"
            " backend_xid IS NOT NULL"
        )
        # The feed may have them, and readers do not see them yet.
        self._stream.given.update((int(xid), None) for (xid,) in waiting)
        self._reading = self._connect()
        self._reading.set_session(isolation_level="REPEATABLE READ", readonly=True)

    def _moved(self) -> SourceBatch:
        """Have the progress in the feed, in every partition."""
        mark = self._progress.mark()
        number = self._progress.number
        token = _Token(self._stream.end_lsn, number)
        return SourceBatch(mark=mark, position=self._next(), token=token)

    def _next(self) -> tuple[int, int]:
        """A position behind all that were given out, and before the next commit."""
        self._position = (self._position[0], self._position[1] + 1)
        return self._position

    # ---- tables

    def _capturable(self) -> dict[tuple[str, str], str]:
        """Tables that are wanted and can be captured, each as SQL names it."""
        found = self._ask(
            "SELECT n.nspname, c.relname, c.relreplident, EXISTS (SELECT 1 FROM pg_index i WHERE"
            " i.indrelid = c.oid AND i.indisprimary), quote_ident(n.nspname) || '.' ||"
            " quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog',"
            " 'information_schema') AND n.nspname NOT LIKE 'pg\\_%%' ORDER BY 1, 2"
        )
        tables: dict[tuple[str, str], str] = {}
        self._names_seen = set()
        for schema, table, identity, has_key, quoted in found:
            names = {f"{schema}.{table}", table if schema == "public" else ""}
            if self._wanted is not None and not names & set(self._wanted):
                continue
            self._names_seen |= names
            if identity == "n" or (identity == "d" and not has_key):
                if quoted not in self._warned:
                    self._warned.add(quoted)
                    log.warning(
                        "Table %s has no primary key, so it is not captured: PostgreSQL would"
                        " refuse updates of it. To capture it: ALTER TABLE %s REPLICA IDENTITY"
                        " FULL.",
                        quoted, quoted,
                    )  # fmt: skip
                continue
            if not has_key and identity == "f" and quoted not in self._warned:
                self._warned.add(quoted)
                log.warning(
                    "Table %s has no primary key; its changes have no key, so their order across"
                    " partitions is not kept.", quoted,
                )  # fmt: skip
            tables[schema, table] = quoted
        return tables

    def _publish(self) -> None:
        """Have a publication; of the tables that can be captured, where there is none."""
        tables = self._capturable()
        missing = sorted(set(self._wanted or ()) - self._names_seen)
        if missing or not tables:
            which = f"no table {missing[0]!r}" if missing else "no table that can be captured"
            raise SourceError(f"The database {self._name} has {which}.")
        if not self._ask("SELECT 1 FROM pg_publication WHERE pubname = %s", self._slot):
            listed = ", ".join(tables.values())
            self._ask(f"CREATE PUBLICATION {_quoted(self._slot)} FOR TABLE {listed}")
        self._publicated = self._published()
        for name in sorted(self._publicated.keys() - tables.keys()):
            table = f"{_quoted(name[0])}.{_quoted(name[1])}"
            self._ask(f"ALTER PUBLICATION {_quoted(self._slot)} DROP TABLE {table}")
            del self._publicated[name]

    def _published(self) -> dict[tuple[str, str], int]:
        rows = self._ask(
            "SELECT t.schemaname, t.tablename, c.oid FROM pg_publication_tables t JOIN pg_namespace"
            " n ON n.nspname = t.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND"
            " c.relname = t.tablename WHERE t.pubname = %s ORDER BY 1, 2",
            self._slot,
        )
        return {(schema, table): oid for schema, table, oid in rows}

    def _look_at_tables(self) -> None:
        """Find tables that were made or dropped since the last look; they are told of in the feed
        once the stream has come to what was before."""
        if time.monotonic() < self._look_at or self._progress.stage != DONE:
            return
        self._look_at = time.monotonic() + LOOK_S
        published, wanted = self._published(), self._capturable()
        gone = {n for n, oid in self._publicated.items() if published.get(n) != oid}
        new = (wanted.keys() - published.keys()) | (gone & wanted.keys())
        self._publicated = published
        for name in sorted(gone - wanted.keys()):
            log.warning(
                "Table %s.%s of %s is gone; so are its rows. Make it anew, and it is captured"
                " again.", *name, self._name,
            )  # fmt: skip
            self._wait_for(name, FORGET)
        for name in sorted(new):
            log.info("Table %s.%s of %s is new; its rows are read.", *name, self._name)
            self._wait_for(name, EMPTY if name in gone else READ)

    def _wait_for(self, name: tuple[str, str], step: int) -> None:
        if len(self._progress.asked) >= ASKED_MAX:
            self._look_at = 0.0  # found again by a later look
            return
        self._progress.asked.append(Asked(*name, step))
        self._batches.append(self._moved())
        self._progress.asked[-1].number = self._progress.number

    def ask_for(self, table: str) -> Asked:
        """Have a table's rows read again, once `has_asked`. Raises `SourceError` for a table that
        is not captured."""
        names = {f"{schema}.{name}": (schema, name) for schema, name in self._publicated}
        found = names.get(table) or names.get(f"public.{table}")
        if found is None:
            raise SourceError(
                f"{self._name} has no table {table!r} that is captured; there are:"
                f" {', '.join(sorted(names)[:10])}."
            )
        asked = Asked(*found, READ, number=-1)
        self._wishes.append(asked)
        return asked

    def has_asked(self, asked: Asked) -> bool:
        """The feed knows of it."""
        return 0 <= asked.number <= self._confirmed.mark

    def _hear(self) -> None:
        """Wishes come at any time; they are told to the feed between transactions."""
        progress = self._progress
        while self._wishes and len(progress.asked) < ASKED_MAX:
            wish = self._wishes.popleft()
            have = next((one for one in progress.asked[1:] if one.name == wish.name), None)
            if have is None:
                progress.asked.append(wish)
                self._batches.append(self._moved())
            wish.number = progress.number

    def _columns(self, oid: int) -> list[tuple[str, int]]:
        """Those that the stream has, too: not what is generated."""
        rows = self._ask(
            "SELECT attname, atttypid FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT"
            " attisdropped AND attgenerated = '' ORDER BY attnum",
            oid,
        )
        return [(name, int(type_oid)) for name, type_oid in rows]

    def _key(self, oid: int) -> tuple[tuple[str, str], ...]:
        """The columns that tell rows apart, each with its type's name."""
        rows = self._ask(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_index i JOIN pg_class c"
            " ON c.oid = i.indrelid JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum ="
            " ANY (i.indkey) WHERE i.indrelid = %s AND CASE c.relreplident WHEN 'i' THEN"
            " i.indisreplident ELSE i.indisprimary END ORDER BY"
            " array_position(i.indkey::int2[], a.attnum)",
            oid,
        )
        return tuple((name, kind) for name, kind in rows)

    def _rows_of(self, oid: int, schema: str, table: str) -> TableRows:
        """As the table is now."""
        key = tuple(name for name, _ in self._key(oid))
        columns = self._columns(oid)
        return TableRows(
            self._feed, self._source(schema, table), columns, key, frozenset(key), self._reader
        )

    def _described(self, relation: Relation) -> TableRows:
        """As the stream says that it is from here on."""
        told = tuple(column.name for column in relation.columns if column.is_key)
        key = told
        if relation.identity == "f":
            names = {column.name for column in relation.columns}
            key = tuple(name for name, _ in self._key(relation.oid) if name in names)
        columns = [(column.name, column.type_oid) for column in relation.columns]
        source = self._source(relation.schema, relation.table)
        return TableRows(self._feed, source, columns, key, frozenset(told), self._reader)

    def _source(self, schema: str, table: str) -> ChangeSource:
        return ChangeSource(self._name, schema, table, "postgresql")

    def _reader(self, oid: int) -> Callable[[str], Any]:
        """How to read a type; those of the database's own are asked for once."""
        if oid not in self._known_types and oid >= 16_384:
            self._known_types.add(oid)
            for base, element, category, kind, name in self._ask(
                "SELECT typbasetype, typelem, typcategory, typtype, format_type(oid, NULL) FROM"
                " pg_type WHERE oid = %s",
                oid,
            ):
                for other in filter(None, (base, element)):
                    self._reader(other)
                self._types.add(oid, base=base, element=element if category == "A" else 0)
                if kind in ("b", "c") and category != "A":
                    log.warning(
                        "The type %s of %s is not known here: its values come as the text that"
                        " PostgreSQL writes for them.", name, self._name,
                    )  # fmt: skip
        return self._types.converter(oid)

    # ---- reading

    def read(self) -> SourceBatch | None:
        """The next batch; None where nothing came for a moment."""
        if self._batches:
            return self._batches.popleft()
        if self._cursor is not None:
            self._tell()
            self._go_on()
        elif self._confirmed.mark >= self._progress.number:
            self._make_slot()
        else:
            time.sleep(LINGER_S)  # until the feed has the announcement
        return self._batches.popleft() if self._batches else None

    def _go_on(self) -> None:
        if self._whole is not None:
            batch = next(self._whole, None)
            if batch is not None:
                self._batches.append(batch)
                return
            self._whole = None
        if self._stream.is_between:
            if self._is_settled:
                self._hear()
                self._look_at_tables()
            if self._chunk is None:
                self._begin_piece()
            if self._whole is not None:
                return
        changes = self._streamed()
        if changes:
            self._position = max(self._position, changes[-1].position)
        if self._stream.is_between and not changes:
            # All that was sent has been handed out; where the server has come to, nothing is ours.
            self._wal_end = max(self._stream.end_lsn, self._cursor.wal_end or 0)
        upto = max(self._stream.end_lsn, self._wal_end)
        if changes or upto > self._confirmed.lsn:
            token = _Token(upto, self._confirmed.mark)
            more = bool(changes) or self._is_busy
            self._batches.append(SourceBatch(changes, token=token, more=more))
        reached = self._stream.reached
        if reached is not None:
            self._stream.reached = None
            self._arrive(*reached)

    @property
    def _is_busy(self) -> bool:
        return self._chunk is not None or self._target is not None or self._progress.stage != DONE

    def _streamed(self) -> list[EncodedChange]:
        """What the slot has sent, up to a bound, or up to the place of a chunk."""
        stream, size = self._stream, 0
        out = stream.out = []
        while len(out) < self._rows_max and size < CHUNK_BYTES and stream.reached is None:
            if stream.is_replaying:
                stream.replay()
                continue
            message = self._cursor.read_message()
            if message is None:
                wait_s = LINGER_S if out else WAIT_S
                if self._batches or not select.select([self._replication], [], [], wait_s)[0]:
                    break
                continue
            size += len(message.payload)
            stream.take(message.payload)
        return out

    def confirm(self, token: _Token) -> None:
        """The server is told by a later read."""
        have = self._confirmed
        self._confirmed = _Token(max(have.lsn, token.lsn), max(have.mark, token.mark))

    def _tell(self) -> None:
        """Let the server forget what the feed has, and know that we live."""
        now = time.monotonic()
        moved = self._confirmed.lsn > self._told_lsn
        if now < self._told_at + (HEARTBEAT_S if moved else 5 * HEARTBEAT_S):
            return
        lsn = self._confirmed.lsn
        self._cursor.send_feedback(write_lsn=lsn, flush_lsn=lsn, force=True)
        self._told_lsn, self._told_at = lsn, now

    # ---- snapshots

    def _begin_piece(self) -> None:
        """Read the next rows of the table whose turn it is, where there is one."""
        progress = self._progress
        if not self._is_settled:
            self._announce(Chunk(None, None, _token()))
        elif progress.stage == READING:
            self._begin_next_table()
        elif progress.asked and progress.asked[0].number <= self._confirmed.mark:
            self._begin_asked(progress.asked[0])

    def _begin_next_table(self) -> None:
        """Of the first snapshot, which takes tables by their names."""
        progress = self._progress
        after = progress.reached or ("", "")
        name = min((one for one in self._publicated if one > after), default=None)
        if name is None:
            progress.stage, progress.chunk, self._target = DONE, None, None
            self._batches.append(self._moved())
        else:
            self._read_on(name)

    def _begin_asked(self, asked: Asked) -> None:
        name = asked.name
        if asked.step in (EMPTY, FORGET):
            self._announce(Chunk(None, None, _token()))
            return
        if name not in self._publicated and name in (wanted := self._capturable()):
            self._ask(f"ALTER PUBLICATION {_quoted(self._slot)} ADD TABLE {wanted[name]}")
            self._publicated = self._published()
        if name in self._publicated:
            self._read_on(name)
        else:
            self._finish(name)  # it was dropped while it waited

    def _read_on(self, name: tuple[str, str]) -> None:
        """The next chunk of a table."""
        target = self._target
        if target is None or target.name != name:
            target = self._target = self._targeted(name)
        if not target.key:
            self._read_whole(target)
            return
        chunk = self._progress.chunk
        only, bounded = None, None
        if self._lacking and chunk is not None and (chunk[0], chunk[1]) == name:
            only, target.after, bounded = self._lacking, chunk[2], chunk[3]
        self._lacking = frozenset()
        before = target.after
        found = self._copy(target, bounded)
        if found is None:
            return
        seen, lines = found
        limit = self._rows_next
        end = before
        if lines:
            values = copied(lines[-1])
            places = [target.rows.names.index(column) for column, _ in target.key]
            end = [(values[place] or b"").decode() for place in places]
        is_last = bounded is None and len(lines) < limit
        window = Window(target.oid, seen, keyless=False)
        self._adapt(lines)
        end = end if bounded is None else bounded
        self._announce(Chunk(target, window, _token(), lines, before, end, is_last, only))

    def _targeted(self, name: tuple[str, str]) -> Target:
        oid = self._publicated[name]
        key = self._key(oid)
        chunk = self._progress.chunk
        after = chunk[3] if chunk is not None and (chunk[0], chunk[1]) == name else None
        found = self._ask("SELECT reltuples::int8 FROM pg_class WHERE oid = %s", oid)
        self._rows_next = min(ROWS_AT_FIRST, self._rows_max)
        return Target(
            oid,
            *name,
            self._rows_of(oid, *name),
            key,
            tuple(column for column, _ in self._columns(oid)),
            int(found[0][0]) if found else -1,
            after,
        )

    def _adapt(self, lines: Sequence[bytes]) -> None:
        """Chunks of about one size, whatever the rows."""
        if lines:
            average = sum(map(len, lines)) / len(lines)
            fit = int(CHUNK_BYTES / (average + 1))
            self._rows_next = max(1, min(self._rows_max, fit, 4 * self._rows_next))

    def _copy(self, target: Target, bounded: list[str] | None) -> tuple[Seen, list[bytes]] | None:
        """Rows in the order of the key, and what their reader saw; None: to be tried again."""
        key = ", ".join(_quoted(name) for name, _ in target.key)
        where = []
        for sign, values in ((">", target.after), ("<=", bounded)):
            if values is not None:
                listed = ", ".join(
                    f"{self._literal(value)}::{kind}"
                    for value, (_, kind) in zip(values, target.key, strict=True)
                )
                where.append(f"({key}) {sign} ({listed})")
        condition = f" WHERE {' AND '.join(where)}" if where else ""
        limit = "" if bounded is not None else f" LIMIT {self._rows_next}"
        try:
            seen = self._locked(target)
            if seen is None:
                return None
            lines = self._lines(target, f"{condition} ORDER BY {key}{limit}")
        finally:
            self._reading.rollback()
        if lines.is_too_much and self._rows_next > 1 and bounded is None:
            self._rows_next = max(1, self._rows_next // 10)
            return None
        return seen, lines.found

    def _lines(self, target: Target, rest: str) -> _Lines:
        """Rows of a table as COPY writes them. rest: of the query."""
        columns = ", ".join(map(_quoted, target.columns))
        table = f"{_quoted(target.schema)}.{_quoted(target.table)}"
        lines = _Lines()
        with self._reading.cursor() as cursor:
            cursor.copy_expert(f"COPY (SELECT {columns} FROM ONLY {table}{rest}) TO STDOUT", lines)
        return lines

    def _locked(self, target: Target) -> Seen | None:
        """Begin to read a table: what will be seen of it. None: later; somebody is about to alter
        it, has dropped it, or waits for a standby with what the feed has already."""
        errors = library().errors
        table = f"{_quoted(target.schema)}.{_quoted(target.table)}"
        try:
            with self._reading.cursor() as cursor:
                cursor.execute(f"LOCK TABLE ONLY {table} IN ACCESS SHARE MODE")
                cursor.execute("SELECT pg_current_snapshot()::text")
                seen = Seen.parse(cursor.fetchone()[0])
        except errors.LockNotAvailable:
            self._reading.rollback()
            return None
        except errors.UndefinedTable:
            self._reading.rollback()
            log.warning("Table %s of %s was dropped before all of it was read.", table, self._name)
            self._finish(target.name)
            return None
        if seen.misses(self._stream.given):
            self._reading.rollback()
            time.sleep(AGAIN_S)
            return None
        columns = self._columns(target.oid)  # nobody alters it while we hold the lock
        if tuple(name for name, _ in columns) != target.columns:
            target.columns = tuple(name for name, _ in columns)
            target.rows = self._rows_of(target.oid, *target.name)
        return seen

    def _literal(self, value: str) -> str:
        with self._control.cursor() as cursor:
            written: bytes = cursor.mogrify("%s", (value,))
        return written.decode()

    def _announce(self, chunk: Chunk) -> None:
        """Write into the server's log where the chunk belongs."""
        self._chunk, self._stream.window = chunk, chunk.window
        self._ask(
            "SELECT pg_logical_emit_message(true, %s, %s::text)", PREFIX, chunk.token.decode()
        )

    def _arrive(self, token: bytes, lsn: int) -> None:
        """The stream has come to the place of a chunk."""
        chunk = self._chunk
        if chunk is None or chunk.token != token:
            return  # of a connector before us
        self._chunk = self._stream.window = None
        self._position = (lsn, 0)
        target, window = chunk.target, chunk.window
        if not self._is_settled:
            self._is_settled = True
            return
        if target is None or window is None:
            self._emptied(self._progress.asked[0])
            return
        if window.is_torn:
            self._rows_next = max(1, self._rows_next // 2)
            self._lacking = chunk.only or frozenset()
            return
        is_void = window.is_void
        changes = [] if is_void else self._chunk_changes(target, chunk.lines, window)
        target.after, target.done = chunk.end, target.done + len(chunk.lines)
        if chunk.before is not None or chunk.end is not None:
            end = chunk.end or chunk.before or []
            self._progress.chunk = (*target.name, chunk.before, end)
        if changes:
            changes[-1].mark_last()
            mark = self._progress.mark()
            token_ = _Token(self._stream.end_lsn, self._progress.number)
            self._batches.append(SourceBatch(changes, mark, chunk.only, token_))
        if chunk.is_last:
            self._finish(target.name)

    def _chunk_changes(
        self, target: Target, lines: Sequence[bytes], window: Window | None
    ) -> list[EncodedChange]:
        rows, moment = target.rows, self._now()
        changes = []
        for line in lines:
            values = copied(line)
            key = rows.record_key(values)
            if window is None or not window.is_newer(key):
                position = self._next()
                changes.append(rows.change(SNAPSHOT_OP, position, moment, None, values, key=key))
        return changes

    def _now(self) -> Moment:
        """Of what is read here, between the stream's transactions."""
        return Moment(self._position[0], _now_ms(), None)

    def _finish(self, name: tuple[str, str]) -> None:
        """All rows of a table were handed on."""
        progress = self._progress
        progress.chunk = self._target = None
        if progress.stage == READING:
            progress.reached = name
        else:
            progress.asked.pop(0)
        self._batches.append(self._moved())

    def _emptied(self, asked: Asked) -> None:
        """What the feed has of a table is void from here on."""
        source = self._source(asked.schema, asked.table)
        rows = TableRows(self._feed, source, (), (), frozenset(), self._reader)
        self._batches.append(SourceBatch([rows.truncate(self._next(), self._now())]))
        if asked.step == FORGET:
            self._finish(asked.name)
        else:
            asked.step = READ
            self._batches.append(self._moved())
            asked.number = self._progress.number

    # ---- tables without a key

    def _read_whole(self, target: Target) -> None:
        """All rows under one snapshot, right here, behind a truncate."""
        seen = self._locked(target)
        if seen is None:
            return
        is_first = self._is_virgin and target.oid not in self._stream.told
        if not is_first or self._progress.stage != READING:
            self._batches.append(SourceBatch([target.rows.truncate(self._next(), self._now())]))
        self._whole = self._pages(target, seen)

    def _pages(self, target: Target, seen: Seen) -> Iterator[SourceBatch]:
        """Some pages of the table's file at a time; nothing of the stream comes in between."""
        try:
            ((size,),) = self._ask("SELECT pg_relation_size(%s::oid)", target.oid)
            at, step = 0, 16
            while at * PAGE_BYTES < size:
                rest = f" WHERE ctid >= '({at},0)'::tid AND ctid < '({at + step},0)'::tid"
                lines = self._lines(target, rest)
                if lines.is_too_much and step > 1:
                    step = max(1, step // 4)
                    continue
                at += step
                target.done += len(lines.found)
                for place in range(0, len(lines.found), self._rows_max):
                    part = lines.found[place : place + self._rows_max]
                    yield SourceBatch(self._chunk_changes(target, part, None))
        finally:
            self._reading.rollback()
        self._announce(Chunk(target, Window(target.oid, seen, keyless=True), _token()))

    # ---- the rest

    def progress(self) -> SnapshotProgress | None:
        """Of the table that is being read; asked from another thread, and no more than a look."""
        target = self._target
        if target is None:
            return None
        waiting = len(self._progress.asked)
        if self._progress.stage == READING:
            reached = self._progress.reached or ("", "")
            waiting += sum(1 for name in list(self._publicated) if name > reached) - 1
        estimate = None if target.estimate < 0 else max(target.estimate, target.done)
        return SnapshotProgress(".".join(target.name), target.done, estimate, max(0, waiting))

    def lag(self) -> PostgresLag:
        """Asked of the server."""
        ((kept,),) = self._ask(
            "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::int8 FROM"
            " pg_replication_slots WHERE slot_name = %s",
            self._slot,
        ) or ((0,),)
        now_ms = _now_ms()
        behind = self._stream.commit_ms or now_ms
        return PostgresLag(max(0, kept or 0), max(0.0, (now_ms - behind) / 1000))

    def close(self) -> None:
        """Tell the server what is safe, and go."""
        self._stream.close()
        try:
            if self._cursor is not None and self._confirmed.lsn > self._told_lsn:
                self._cursor.send_feedback(flush_lsn=self._confirmed.lsn, force=True)
        finally:
            for connection in (self._replication, self._reading, self._control):
                if connection is not None:
                    connection.close()


class _Lines:
    """A file for COPY: keeps lines, up to a bound."""

    def __init__(self) -> None:
        self.found: list[bytes] = []
        self._size = 0

    @property
    def is_too_much(self) -> bool:
        """Not all were kept."""
        return self._size > LINES_BYTES_MAX

    def write(self, line: bytes) -> None:
        """Called once for each row."""
        self._size += len(line)
        if self._size <= LINES_BYTES_MAX or not self.found:
            self.found.append(line[:-1])

    def read(self, _size: int = 0) -> bytes:
        """A file has one."""
        return b""


def _token() -> bytes:
    return uuid.uuid4().hex.encode()


def library() -> Any:
    """psycopg2. Raises `SourceError` where it is not installed."""
    try:
        import psycopg2
        import psycopg2.errors
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
    if code == "57014":
        return SourceUnavailable(
            f"The slot {slot} cannot be made yet: PostgreSQL waits for transactions that are open."
            " End those that take long (SELECT * FROM pg_stat_activity WHERE xact_start < now() -"
            " interval '1 minute')."
        )
    if code == "55P03":
        return SourceUnavailable(
            "Somebody alters a table; PostgreSQL lets nobody near it meanwhile."
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
