"""A feed in memory that obeys the leader's rules, a connector's step by step, and what a reader
makes of the feed.

The judge is the leader's own `FeedTable`; the connector's sender is the real one. A crash may come
between any two frames: then the source is opened anew with what the feed has.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aegis_cluster.broker.feed_stm import FeedTable
from aegis_cluster.cdc.connector import _Sender
from aegis_cluster.cdc.envelope import change_from
from aegis_cluster.cdc.events import Delete, Insert, Truncate, Update
from aegis_cluster.cdc.source import PartitionPoint, SourceBatch
from aegis_cluster.ids import GroupId, LogIndex
from aegis_cluster.message import from_record
from aegis_cluster.wire.batch import decode_batch
from aegis_cluster.wire.descriptions import PartitionInfo, TopicInfo, TopicSettings

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping

    from aegis_cluster.cdc.events import ChangeEvent
    from aegis_cluster.cdc.source import Source
    from aegis_cluster.message import ReceivedMessage

HOLDER = (1, "writer")
SETTINGS = TopicSettings(kind="cdc", max_message_bytes=8 << 20)


class Crash(Exception):
    """The connector dies here."""


class MemoryFeed:
    """Partitions as lists of records; `crash` is asked before every frame."""

    def __init__(self, partitions: int, crash: Callable[[], bool]) -> None:
        placed = tuple(PartitionInfo(n, GroupId(n + 1), ()) for n in range(partitions))
        self.info = TopicInfo("shop", SETTINGS, placed)
        self.tables = [FeedTable() for _ in placed]
        self.records: list[list[ReceivedMessage]] = [[] for _ in placed]
        self._crash = crash
        for table in self.tables:
            table.apply(table.fenced(*HOLDER).encode(), LogIndex(1))

    @property
    def points(self) -> list[PartitionPoint]:
        return [PartitionPoint(t.committed.position, t.committed.mark) for t in self.tables]

    async def append(
        self,
        partition: int,
        position: tuple[int, int],
        batch: bytes | None,
        deadline: float,
        *,
        mark: bytes | None = None,
    ) -> None:
        if self._crash():
            raise Crash
        table = self.tables[partition]
        decision = table.decide(*HOLDER, position)
        assert decision.error is None, decision.error
        table.apply(table.moved(position, mark).encode(), LogIndex(2))
        if batch is not None:
            stored = self.records[partition]
            for record in decode_batch(batch):
                stored.append(from_record("shop", partition, record._replace(offset=len(stored))))

    def deadline(self, _: None) -> float:
        return 0.0

    def changes(self) -> list[ChangeEvent]:
        """Of all partitions, each in order."""
        found = [change_from(record) for records in self.records for record in records]
        return [change for change in found if change is not None]


class Runner:
    """One source and its feed; `step` does what a connector's loop does once."""

    def __init__(
        self, make: Callable[[], Source], partitions: int, rng: random.Random, *, crashes: float
    ) -> None:
        self.feed = MemoryFeed(partitions, lambda: rng.random() < self.crashes)
        self.crashes = crashes
        self._make = make
        self._source: Source | None = None
        self._sender: Any = None
        self._rng = rng

    @property
    def source(self) -> Source | None:
        """None while it is dead."""
        return self._source

    async def step(self) -> SourceBatch:
        """Read, send, confirm; or die on the way, which the next step makes good."""
        try:
            return await self._step()
        except Crash:
            await self.die()
            return SourceBatch()

    async def _step(self) -> SourceBatch:
        if self._source is None:
            self._source = self._make()
            rows = self._rng.choice((1, 3, 50))
            await self._source.open("cluster/shop", self.feed.points, rows)
            self._sender = _Sender(self.feed, self.feed, self.feed.points)  # type: ignore[arg-type]
        batch = await self._source.read()
        await self._sender.send(batch)
        if self._rng.random() < self.crashes:
            raise Crash
        if batch.token is not None:
            await self._source.confirm(batch.token)
        return batch

    async def die(self) -> None:
        """As far as the database can tell: what was confirmed may be trimmed or not."""
        source, self._source = self._source, None
        if source is not None:
            await source.close()

    async def drain(self) -> None:
        """Until there is nothing more, without a crash."""
        self.crashes = 0.0
        async with asyncio.timeout(15):
            while (await self.step()).more:
                pass


def exactly(row: Mapping[str, Any]) -> dict[str, tuple[type, Any]]:
    """1, 1.0 and True are three values."""
    return {name: (type(value), value) for name, value in row.items()}


def folded(changes: list[ChangeEvent]) -> dict[str, list[dict[str, tuple[type, Any]]]]:
    """Rows by table, as a reader ends up with them; that nothing is twice is checked on the way."""
    tables: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    seen: set[Any] = set()
    for change in changes:
        place = (change.partition, change.position, change.source.table)
        assert place not in seen, f"twice: {change}"
        seen.add(place)
        rows = tables.setdefault((change.source.table, change.partition), {})
        key = repr(sorted(exactly(change.key or {}).items()))
        match change:
            case Insert() | Update():
                rows[key] = exactly(change.new_row)
            case Delete():
                rows.pop(key, None)
            case Truncate():  # of this partition's rows
                rows.clear()
    found: dict[str, list[dict[str, tuple[type, Any]]]] = {}
    for (table, _), rows in sorted(tables.items()):
        found.setdefault(table, []).extend(rows.values())
    return {table: sorted(rows, key=repr) for table, rows in found.items() if rows}
