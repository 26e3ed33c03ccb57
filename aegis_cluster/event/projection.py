"""Projections: events folded into tables or states, each exactly once.

The idea: how far a projection has come is written in the same transaction as what it made of the
events, so after a crash both are there or neither is. A projection that was changed says so by its
`revision`, and is then built anew from the first event. Where tables are is a *target*; by default
a SQLite file, which several projections may share.

    class Balances(Projection):
        name, streams = "balances", "account-*"

        def create(self, db):
            db.execute("CREATE TABLE balance (account TEXT PRIMARY KEY, amount REAL)")

        def apply(self, event, db):
            db.execute("INSERT INTO balance VALUES (?, ?) ON CONFLICT DO UPDATE SET …", …)

    async with ProjectionRunner(store, Balances(), "views.sqlite") as running:
        await running.catch_up()             # then: running.query("SELECT …")
        await running.run()                  # goes on until it is cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, Self

from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import Misuse
from aegis_cluster.event.subscription import Position

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator
    from types import TracebackType

    from aegis_cluster.event.model import Event
    from aegis_cluster.event.store import EventStore
    from aegis_cluster.event.subscription import EventSubscription

    Progress = Callable[[int, int], None]

EVENTS_PER_COMMIT: Final = 1_000
PROGRESS_TABLE: Final = "aegis_projection"
BUSY_S: Final = 30.0
"""How long one writer of a file waits for another one, who commits a thousand events at a time."""


class Projection:
    """What to make of events; subclass it.

    name: of its progress in the target. streams, event_types: what it follows, as in
    `EventStore.subscribe`. revision: raise it when `create` or `apply` have changed; the projection
    is then built anew.
    """

    name: ClassVar[str] = ""
    streams: ClassVar[str] = "*"
    event_types: ClassVar[Collection[str] | None] = None
    revision: ClassVar[int] = 1

    def create(self, db: Any) -> None:
        """Make its tables; they are not there. db: the target's connection, for SQLite a
        `sqlite3.Connection`."""

    def drop(self, db: Any) -> None:
        """Remove its tables, if they are there."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to drop its tables.")

    def apply(self, event: Event, db: Any) -> None:
        """Take in one event; it commits nothing itself."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to apply an event.")


class StateProjection(Projection):
    """Folds events into a state for each key, a JSON-like value; `running.state(key)` tells it.

    Subclass it with a `fold`; states are kept in a table of a SQLite file, named after it.
    """

    def key(self, event: Event) -> str | None:
        """Whose state an event belongs to, by default its stream's; None: nobody's."""
        return event.aggregate_id

    def begin(self) -> Any:
        """A state before its first event."""
        return {}

    def fold(self, state: Any, event: Event) -> Any:
        """The state after an event."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to fold an event.")

    @property
    def table(self) -> str:
        """Its table, quoted: (key, state)."""
        return '"' + f"state of {self.name}".replace('"', '""') + '"'

    def create(self, db: Any) -> None:
        db.execute(f"CREATE TABLE {self.table} (key TEXT PRIMARY KEY, state TEXT) WITHOUT ROWID")

    def drop(self, db: Any) -> None:
        db.execute(f"DROP TABLE IF EXISTS {self.table}")

    def apply(self, event: Event, db: Any) -> None:
        key = self.key(event)
        if key is None:
            return
        row = db.execute(f"SELECT state FROM {self.table} WHERE key = ?", (key,)).fetchone()
        state = self.fold(self.begin() if row is None else json.loads(row[0]), event)
        db.execute(f"INSERT OR REPLACE INTO {self.table} VALUES (?, ?)", (key, json.dumps(state)))


class Target(Protocol):
    """Where a projection writes: a database with transactions. One object serves one runner."""

    def open(self) -> None: ...

    def close(self) -> None: ...

    def transaction(self) -> contextlib.AbstractContextManager[Any]:
        """A block with the connection that projections get: committed at its end, or not at all."""

    def progress(self, name: str) -> tuple[int, str] | None:
        """Revision and position of a projection, as committed."""

    def note_progress(self, name: str, revision: int, position: str) -> None:
        """Write them within the transaction that is open."""

    def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Rows, as committed; from any thread."""


class SQLiteTarget:
    """A SQLite file, which several projections and processes may share; see `Target`."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._db: sqlite3.Connection | None = None

    def open(self) -> None:
        self._db = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_S)
        self._db.execute("PRAGMA journal_mode = WAL")
        # A power cut may take the newest transactions, with their progress: they are done again.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            f"CREATE TABLE IF NOT EXISTS {PROGRESS_TABLE}"
            " (name TEXT PRIMARY KEY, revision INTEGER, position TEXT)"
        )

    def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._opened()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def progress(self, name: str) -> tuple[int, str] | None:
        row = self._opened().execute(
            f"SELECT revision, position FROM {PROGRESS_TABLE} WHERE name = ?", (name,)
        )
        found: tuple[int, str] | None = row.fetchone()
        return found

    def note_progress(self, name: str, revision: int, position: str) -> None:
        self._opened().execute(
            f"INSERT OR REPLACE INTO {PROGRESS_TABLE} VALUES (?, ?, ?)", (name, revision, position)
        )

    def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self._path, timeout=BUSY_S)) as db:
            return db.execute(sql, parameters).fetchall()

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            raise Misuse("The projection is not open; use 'async with ProjectionRunner(…)'.")
        return self._db


class ProjectionRunner:
    """One projection on one target; an async context manager. Any number may run side by side."""

    def __init__(
        self, store: EventStore, projection: Projection, target: str | Path | Target
    ) -> None:
        """target: the path of a SQLite file, or another `Target`. Raises `Misuse` for a projection
        without a name."""
        if not projection.name:
            raise Misuse(f"{type(projection).__name__} needs a `name`, by which it is found again.")
        self._store = store
        self._projection = projection
        self._target: Target = SQLiteTarget(target) if isinstance(target, str | Path) else target
        self._position = Position()
        self._news = asyncio.Event()
        """Set, and replaced, with each commit."""
        self.applied = 0
        """Events that were applied since it was opened or built anew."""

    async def __aenter__(self) -> Self:
        self._target.open()
        found = self._target.progress(self._projection.name)
        if found is None or found[0] != self._projection.revision:
            self._begin(drop=found is not None)
        else:
            self._position = Position.parse(found[1])
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._target.close()

    @property
    def position(self) -> Position:
        """What is applied and committed."""
        return self._position

    def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Rows of the target's tables, through a connection of its own: what is committed."""
        return self._target.query(sql, parameters)

    async def live(self, sql: str, parameters: Any = ()) -> AsyncIterator[list[tuple[Any, ...]]]:
        """The rows of a query now, and again each time that what this runner has committed changes
        them; without an end."""
        shown: list[tuple[Any, ...]] | None = None
        while True:
            news = self._news
            rows = self.query(sql, parameters)
            if rows != shown:
                shown = rows
                yield rows
            await news.wait()

    def state(self, key: str) -> Any:
        """Of a `StateProjection`, the state of one key; None where there was no event of it."""
        rows = self.query(f"SELECT state FROM {self._states().table} WHERE key = ?", (key,))
        return json.loads(rows[0][0]) if rows else None

    def states(self) -> dict[str, Any]:
        """Of a `StateProjection`, all of them by key."""
        rows = self.query(f"SELECT key, state FROM {self._states().table}")
        return {key: json.loads(state) for key, state in rows}

    def _states(self) -> StateProjection:
        if not isinstance(self._projection, StateProjection):
            raise Misuse("Only a StateProjection has states; ask others by `query`.")
        return self._projection

    async def catch_up(self, progress: Progress | None = None) -> int:
        """Apply all that is there now; how many events that were. progress: is told how many
        offsets of how many are done. Raises what reading raises: `Corruption`, `RequestTimeout`."""
        before = self.applied
        ends = await self._ends() if progress is not None else {}
        async with self._subscribe(live=False) as events:
            await self._apply_all(events, progress, ends)
        return self.applied - before

    async def run(self) -> None:
        """Apply what is there and what comes, until the engine is closed or the call cancelled."""
        async with self._subscribe(live=True) as events:
            await self._apply_all(events, None, {})

    async def rebuild(self, progress: Progress | None = None) -> int:
        """Begin anew with empty tables, and catch up; see `catch_up`."""
        self._begin(drop=True)
        return await self.catch_up(progress)

    def _subscribe(self, *, live: bool) -> EventSubscription:
        projection = self._projection
        return self._store.subscribe(
            projection.streams,
            event_types=projection.event_types,
            position=self._position,
            live=live,
        )

    async def _ends(self) -> dict[int, int]:
        info = await self._store.info()
        deadline = self._store.engine.deadline(None)
        found = await list_offsets(self._store.engine.cluster, info.name, deadline)
        return {partition: one.last_stable_offset for partition, one in found.items()}

    async def _apply_all(
        self, events: EventSubscription, progress: Progress | None, ends: dict[int, int]
    ) -> None:
        while True:
            found = await events.poll(EVENTS_PER_COMMIT)
            self._apply(found, events.position)
            self._tell(progress, ends)
            self._news.set()
            self._news = asyncio.Event()
            if not found:
                return

    def _apply(self, events: list[Event], position: Position) -> None:
        """In one transaction that waits for nothing, so that others may write to the same file."""
        projection, target = self._projection, self._target
        with target.transaction() as db:
            for event in events:
                projection.apply(event, db)
            target.note_progress(projection.name, projection.revision, str(position))
        self._position = position
        self.applied += len(events)

    def _tell(self, progress: Progress | None, ends: dict[int, int]) -> None:
        if progress is not None:
            offsets = self._position.as_dict()
            done = sum(min(offsets.get(partition, 0), end) for partition, end in ends.items())
            progress(done, sum(ends.values()))

    def _begin(self, *, drop: bool) -> None:
        """Empty tables, and no position, in one step."""
        projection, target = self._projection, self._target
        with target.transaction() as db:
            if drop:
                projection.drop(db)
            projection.create(db)
            target.note_progress(projection.name, projection.revision, "")
        self._position, self.applied = Position(), 0
