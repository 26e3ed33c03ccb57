"""Projections: events folded into tables of a SQLite file, each exactly once.

The idea: how far a projection has come is written in the same transaction as what it made of the
events, so after a crash both are there or neither is. A projection that was changed says so by its
`revision`, and is then built anew from the first event.

    class Balances(Projection):
        name, streams = "balances", "account-*"

        def create(self, db):
            db.execute("CREATE TABLE balance (account TEXT PRIMARY KEY, amount REAL)")

        def apply(self, event, db):
            db.execute("INSERT INTO balance VALUES (?, ?) ON CONFLICT DO UPDATE SET …", …)

    async with ProjectionRunner(store, Balances(), "balances.sqlite") as running:
        await running.catch_up()             # then: running.query("SELECT …")
        await running.run()                  # goes on until it is cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import Misuse
from aegis_cluster.event.subscription import Position

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType

    from aegis_cluster.event.model import Event
    from aegis_cluster.event.store import EventStore
    from aegis_cluster.event.subscription import EventSubscription

    Progress = Callable[[int, int], None]

EVENTS_PER_COMMIT: Final = 1_000
COMMIT_AFTER_S: Final = 0.1
"""A quiet moment, after which what was applied is committed, for `query` to see."""
PROGRESS_TABLE: Final = "aegis_projection"


class Projection:
    """What to make of events; subclass it.

    name: of its progress in the file. streams, event_types: what it follows, as in
    `EventStore.subscribe`. revision: raise it when `create` or `apply` have changed; the projection
    is then built anew.
    """

    name: ClassVar[str] = ""
    streams: ClassVar[str] = "*"
    event_types: ClassVar[Collection[str] | None] = None
    revision: ClassVar[int] = 1

    def create(self, db: sqlite3.Connection) -> None:
        """Make its tables; they are not there."""

    def drop(self, db: sqlite3.Connection) -> None:
        """Remove its tables, if they are there."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to drop its tables.")

    def apply(self, event: Event, db: sqlite3.Connection) -> None:
        """Take in one event; it commits nothing itself."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to apply an event.")


class ProjectionRunner:
    """One projection on one file; an async context manager.

    Several may run at a time, each on a file of its own (SQLite has one writer for each file).
    """

    def __init__(self, store: EventStore, projection: Projection, path: str | Path) -> None:
        """Raise `Misuse` for a projection without a name."""
        if not projection.name:
            raise Misuse(f"{type(projection).__name__} needs a `name`, by which it is found again.")
        self._store = store
        self._projection = projection
        self._path = Path(path)
        self._db: sqlite3.Connection | None = None
        self._position = Position()
        self.applied = 0
        """Events that were applied since it was opened or built anew."""

    async def __aenter__(self) -> Self:
        self._db = sqlite3.connect(self._path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(
            f"CREATE TABLE IF NOT EXISTS {PROGRESS_TABLE}"
            " (name TEXT PRIMARY KEY, revision INTEGER, position TEXT)"
        )
        row = self._db.execute(
            f"SELECT revision, position FROM {PROGRESS_TABLE} WHERE name = ?",
            (self._projection.name,),
        ).fetchone()
        if row is None or row[0] != self._projection.revision:
            self._begin(drop=row is not None)
        else:
            self._position = Position.parse(row[1])
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._db is not None:
            if self._db.in_transaction:
                self._db.rollback()
            self._db.close()
            self._db = None

    @property
    def position(self) -> Position:
        """What is applied and committed."""
        return self._position

    def query(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Rows of its tables, through a connection of its own: what is committed."""
        with contextlib.closing(sqlite3.connect(self._path)) as db:
            return db.execute(sql, parameters).fetchall()

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
        db, pending = self._open(), 0
        while True:
            event = await events.next(timeout=COMMIT_AFTER_S if pending else None)
            if event is not None:
                if not pending:
                    db.execute("BEGIN IMMEDIATE")
                self._projection.apply(event, db)
                self.applied += 1
                pending += 1
                if pending < EVENTS_PER_COMMIT:
                    continue
            is_end = event is None and not pending
            if pending or is_end:
                self._commit(events.position)
                self._tell(progress, ends)
                pending = 0
                await asyncio.sleep(0)
            if is_end:
                return

    def _commit(self, position: Position) -> None:
        db = self._open()
        db.execute(
            f"UPDATE {PROGRESS_TABLE} SET position = ? WHERE name = ?",
            (str(position), self._projection.name),
        )
        if db.in_transaction:
            db.execute("COMMIT")
        self._position = position

    def _tell(self, progress: Progress | None, ends: dict[int, int]) -> None:
        if progress is not None:
            offsets = self._position.as_dict()
            done = sum(min(offsets.get(partition, 0), end) for partition, end in ends.items())
            progress(done, sum(ends.values()))

    def _begin(self, *, drop: bool) -> None:
        """Empty tables, and no position, in one step."""
        db, projection = self._open(), self._projection
        db.execute("BEGIN IMMEDIATE")
        try:
            if drop:
                projection.drop(db)
            projection.create(db)
            db.execute(
                f"INSERT OR REPLACE INTO {PROGRESS_TABLE} VALUES (?, ?, '')",
                (projection.name, projection.revision),
            )
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
        self._position, self.applied = Position(), 0

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise Misuse("The projection is not open; use 'async with ProjectionRunner(…)'.")
        return self._db
