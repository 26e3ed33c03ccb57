"""The connector: copies a source's changes into its feed, so that none is lost and none is twice.

The idea: it takes the feed over with a fence, learns from the feed where each partition stands, and
has the source begin before that; what a partition has already is passed over. Each frame carries
the position of its last change, so records and position are there together or not at all. Only
when all partitions have a batch is it confirmed to the source.

The rules it protects: changes held in memory are bounded (one batch on its way, one being read);
a connector that lost its lease stops, and one that does not know it is refused by the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.cdc.envelope import rows_of
from aegis_cluster.cdc.source import PartitionPoint, SourceBatch
from aegis_cluster.cdc.tracker import Tracker
from aegis_cluster.client.feeds import FeedLog
from aegis_cluster.client.leases import Leases
from aegis_cluster.errors import (
    AegisError,
    FeedFenced,
    LeaseHeld,
    LeaseLost,
    MessageTooLarge,
    NotReady,
    OutcomeUnknown,
    RequestTimeout,
    SourceUnavailable,
    Unavailable,
)
from aegis_cluster.wire.batch import BatchBuilder
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aegis_cluster.cdc.envelope import Change
    from aegis_cluster.cdc.source import Source
    from aegis_cluster.client.leases import Lease
    from aegis_cluster.client.producer import Row
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.wire.descriptions import TopicInfo

FRAME_BYTES: Final = 1 << 20
"""A partition's share of a batch is cut into frames of about this size."""
MARKED_BYTES: Final = 6 << 20
"""A piece of a snapshot is in one frame with its mark, or some of its rows would come again."""
ROW_BYTES: Final = 64
"""What a record takes beside its value, about."""
BATCHES_MAX: Final = 64
"""Read ahead, however few rows they hold."""
LEASE_TTL_S: Final = 6.0
LEASE_WAIT_S: Final = 3.0
"""How long one try to get the lease may take; then it is tried again."""
PAUSE_S: Final = 0.2
PAUSE_S_MAX: Final = 5.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ConnectorState:
    """What a connector says of itself.

    role: `"starting"`, `"running"`, `"waiting"` (another process holds the lease) or `"stopped"`.
    is_current: it has reached the end of what there was to read. changes: sent since it started.
    last_ms: the source's time of the newest one. error: what it
    met last, and tries again after.
    """

    role: str = "starting"
    is_current: bool = False
    changes: int = 0
    last_ms: int = 0
    error: str | None = None


class Connector:
    """Runs until it is cancelled, or meets what another try would not help."""

    def __init__(
        self,
        engine: StreamingEngine,
        source: Source,
        info: TopicInfo,
        *,
        buffer_size: int,
        tracker: Tracker | None = None,
    ) -> None:
        self.state = ConnectorState()
        self.on_change: Callable[[], None] = lambda: None
        """Called when `state.role` or `state.error` has changed."""
        self._engine = engine
        self._source = source
        self._info = info
        self._tracker = tracker or Tracker(info.name, {})
        self._rows_max = max(1, buffer_size // 4)  # being read, read, joined, on its way

    async def run(self) -> None:
        """Raises what makes going on pointless: `SourceError`, `TopicNotFound`, …."""
        pause_s = PAUSE_S
        while True:
            sent = self.state.changes
            try:
                await self._run_once()
            except LeaseHeld as error:
                holder = error.details.get("holder", "another process")
                self._say("waiting", f"{holder} has the lease; taking over when it ends.")
                pause_s = PAUSE_S  # so that whoever waits takes over soon
            except _TRY_AGAIN as error:
                self._say("starting", str(error))
            pause_s = PAUSE_S if self.state.changes > sent else min(2 * pause_s, PAUSE_S_MAX)
            await asyncio.sleep(pause_s)

    def _say(self, role: str, error: str | None = None) -> None:
        if (role, error) != (self.state.role, self.state.error):
            self.state.role, self.state.error = role, error
            if error is not None:
                log.info("The connector of feed %s: %s", self._info.name, error)
            self.on_change()

    async def _run_once(self) -> None:
        if self._engine.is_embedded:  # nobody else can have it open
            await self._hold(None)
            return
        leases = Leases(self._engine.cluster)
        name = f"cdc/{self._info.name}"
        lease = await leases.acquire(
            name, ttl=LEASE_TTL_S, holder=f"feed {self._info.name}", timeout=LEASE_WAIT_S
        )
        async with lease:
            working = asyncio.ensure_future(self._hold(lease))
            losing = asyncio.ensure_future(lease.lost())
            try:
                await asyncio.wait({working, losing}, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    raise LeaseLost(f"The lease of {name!r} has ended.")
                await working
            finally:
                for task in (working, losing):
                    task.cancel()
                await asyncio.gather(working, losing, return_exceptions=True)

    async def _hold(self, lease: Lease | None) -> None:
        """Be the connector, until something ends that."""
        feed = FeedLog(self._engine.cluster, self._info)
        if lease is not None:
            epoch = lease.token
        else:
            before = await feed.read(self._engine.deadline(None))
            epoch = max(point.epoch for point in before) + 1
        found = await feed.fence(epoch, uuid.uuid4().hex, self._engine.deadline(None))
        points = [PartitionPoint(point.position, point.mark) for point in found]
        identity = f"{self._engine.cluster.metadata.cluster_id}/{self._info.name}"
        try:
            await self._source.open(identity, points, self._rows_max)
            self._say("running")
            await self._copy(feed, points, lease)
        finally:
            with contextlib.suppress(AegisError):
                await self._source.close()

    async def _copy(self, feed: FeedLog, points: list[PartitionPoint], lease: Lease | None) -> None:
        """Read ahead while what was read before is on its way."""
        sender = _Sender(self._engine, feed, points)
        ahead = _Ahead(self._source, self._rows_max)
        try:
            while True:
                batch = self._tracker.tracked(await ahead.take())
                if lease is not None:
                    lease.check()
                await sender.send(batch)
                if batch.token is not None:
                    await self._source.confirm(batch.token)
                self._note(batch)
        finally:
            await ahead.close()

    def _note(self, batch: SourceBatch) -> None:
        if batch.changes:
            self.state.changes += len(batch.changes)
            self.state.last_ms = batch.changes[-1].ts_ms
        if self.state.is_current == batch.more:
            self.state.is_current = not batch.more
            self.on_change()


_TRY_AGAIN: Final = (
    FeedFenced,
    LeaseLost,
    NotReady,
    OutcomeUnknown,
    RequestTimeout,
    SourceUnavailable,
    Unavailable,
)


class _Ahead:
    """Reads while the connector sends: what came meanwhile goes on its way together, so the slower
    the feed, the larger its frames, and the fewer of them."""

    def __init__(self, source: Source, rows_max: int) -> None:
        self._source, self._rows_max = source, rows_max
        self._batches: deque[SourceBatch] = deque()
        self._rows = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        try:
            while True:
                batch = await self._source.read()
                self._batches.append(batch)
                self._rows += len(batch.changes)
                self._news.set()
                while self._rows >= self._rows_max or len(self._batches) >= BATCHES_MAX:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._news.set()

    async def take(self) -> SourceBatch:
        """What was read since, or comes next. Raises what reading does."""
        while not self._batches:
            if self._reading.done():
                self._reading.result()
            self._news.clear()
            await self._news.wait()
        batch = self._batches.popleft()
        if batch.is_plain:
            batch = self._joined(batch)
        self._rows -= len(batch.changes)
        self._room.set()
        return batch

    def _joined(self, first: SourceBatch) -> SourceBatch:
        more = []
        while self._batches and self._batches[0].is_plain:
            more.append(self._batches.popleft())
        if not more:
            return first
        changes = list(first.changes)
        for batch in more:
            changes += batch.changes
        tokens = [batch.token for batch in (first, *more) if batch.token is not None]
        return SourceBatch(changes, token=tokens[-1] if tokens else None, more=more[-1].more)

    async def close(self) -> None:
        """Read no more."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


_Keyed = tuple["Change", "bytes | None"]
"""A change and its record's key."""


class _Sender:
    """Takes batches apart into frames for each partition."""

    def __init__(
        self, engine: StreamingEngine, feed: FeedLog, points: list[PartitionPoint]
    ) -> None:
        self._engine = engine
        self._feed = feed
        self._positions = [point.position for point in points]
        self._compression = feed.info.settings.compression

    async def send(self, batch: SourceBatch) -> None:
        """Returns once all of it is committed."""
        shares = self._shares(batch)
        await asyncio.gather(
            *(self._send(number, share, batch.mark) for number, share in enumerate(shares) if share)
        )
        position = batch.position
        if position is not None:
            numbers = range(len(self._positions))
            await asyncio.gather(*(self._move(number, position, batch.mark) for number in numbers))

    async def _move(self, number: int, position: tuple[int, int], mark: bytes | None) -> None:
        """Have the position and the mark in one partition, without a record."""
        await self._feed.append(number, position, None, self._engine.deadline(None), mark=mark)
        self._positions[number] = position

    def _shares(self, batch: SourceBatch) -> list[list[_Keyed]]:
        """What each partition gets: its rows, and all that is about a table as a whole; not what
        it has."""
        count = len(self._positions)
        shares: list[list[_Keyed]] = [[] for _ in range(count)]
        if count == 1 and batch.only is None:
            have = self._positions[0]
            shares[0] = [(one, one.record_key) for one in batch.changes if one.position > have]
            return shares
        for change in batch.changes:
            key = change.record_key
            everywhere = change.is_everywhere
            for number in range(count) if everywhere else (partition_for(key or b"", count),):
                lacks = batch.only is None or number in batch.only
                if lacks and change.position > self._positions[number]:
                    shares[number].append((change, key))
        return shares

    async def _send(self, number: int, share: list[_Keyed], mark: bytes | None) -> None:
        for data, position, is_last in self._frames(share, MARKED_BYTES if mark else FRAME_BYTES):
            deadline = self._engine.deadline(None)
            await self._feed.append(
                number, position, data, deadline, mark=mark if is_last else None
            )
            self._positions[number] = position

    def _frames(
        self, share: list[_Keyed], bytes_max: int
    ) -> Iterator[tuple[bytes, tuple[int, int], bool]]:
        """Batches with the position of their last change; one that is larger has its own."""
        now_ms = time.time_ns() // 1_000_000
        feed = self._feed.info.name
        rows: list[Row] = []
        size, last = 0, (0, 0)
        for change, known in share:
            more = rows_of(change, feed, now_ms, known)
            taken = ROW_BYTES + len(known or b"") + self._checked(change, more[0][2] or b"")
            if rows and size + taken > bytes_max:
                yield self._batch(rows), last, False
                rows, size = [], 0
            rows += more
            size += taken
            last = change.position
        yield self._batch(rows), last, True

    def _checked(self, change: Change, value: bytes) -> int:
        """Its size. Raises `MessageTooLarge`."""
        size, allowed = len(value), self._feed.info.settings.max_message_bytes
        if size > allowed:
            raise MessageTooLarge(
                f"A row of {change.source.full_name} takes {size} bytes, and the feed"
                f" {self._feed.info.name} allows {allowed}. Raise its max_message_size"
                " (up to 8MB), or leave the table out.",
                have=size,
                at_most=allowed,
            )
        return size

    def _batch(self, rows: list[Row]) -> bytes:
        builder = BatchBuilder(compression=self._compression)
        builder.append_rows(rows)
        return builder.build()
