"""Following events: what is there first, then what comes, each once and in its stream's order.

The idea: events are records of a log, so a subscription reads logs and leaves out what it was not
asked for. Where it has come to is one offset for each partition, a *position*; whoever goes on from
there misses nothing and sees nothing twice. One whole stream begins with its own events, by the
index, instead of with the whole log.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import Misuse
from aegis_cluster.event.codec import events_of
from aegis_cluster.event.names import check_stream
from aegis_cluster.wire.event_frames import SYSTEM_PREFIX
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping
    from types import TracebackType

    from aegis_cluster.event.model import Event
    from aegis_cluster.event.store import EventStore
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.records import RecordColumns

ALL: Final = "*"


class Position(NamedTuple):
    """The next offset to read of each partition; `str` gives a text that `Position.parse` takes.

    A partition that is not named is read from its beginning.
    """

    offsets: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, offsets: Mapping[int, int]) -> Position:
        return cls(tuple(sorted(offsets.items())))

    @classmethod
    def parse(cls, text: str) -> Position:
        """Raise `Misuse` for what is no position."""
        try:
            pairs = [pair.split(":") for pair in text.split(",") if pair]
            return cls.of({int(partition): int(offset) for partition, offset in pairs})
        except (ValueError, AttributeError):
            raise Misuse(f"{text!r} is no position; one looks like '0:17,1:4'.") from None

    def as_dict(self) -> dict[int, int]:
        return dict(self.offsets)

    def __str__(self) -> str:
        return ",".join(f"{partition}:{offset}" for partition, offset in self.offsets)


class Filter(NamedTuple):
    """Which streams, by their name or its beginning, and which types of event (all: None)."""

    name: str | None
    prefix: str
    types: frozenset[str] | None

    @classmethod
    def of(cls, pattern: str, types: Collection[str] | None) -> Filter:
        """Raise `Misuse` for a pattern that is neither a name nor its beginning with a `*`."""
        if isinstance(types, str):
            types = [types]
        chosen = None if types is None else frozenset(types)
        if not isinstance(pattern, str) or not pattern or "*" in pattern[:-1]:
            raise Misuse(
                f"{pattern!r}: follow a stream by its name, several by the beginning of their names"
                " ('account-*'), or all ('*')."
            )
        if pattern.endswith(ALL):
            return cls(None, pattern[:-1], chosen)
        check_stream(pattern)
        return cls(pattern, "", chosen)

    def wants_stream(self, stream: str) -> bool:
        if self.name is not None:
            return stream == self.name
        return stream.startswith(self.prefix) and not stream.startswith(SYSTEM_PREFIX)

    def wants_type(self, event_type: str) -> bool:
        return self.types is None or event_type in self.types


class EventSubscription:
    """Made by `EventStore.subscribe`; iterate over it. `async with` closes it at the end.

    position: where to go on after the event that was handed out last; keep it together with what
    was made of the events, and nothing is missed or done twice.
    """

    def __init__(
        self,
        store: EventStore,
        chosen: Filter,
        *,
        start: Position | None,
        from_now: bool,
        live: bool,
    ) -> None:
        self._store = store
        self._filter = chosen
        self._start = start
        self._from_now = from_now
        self._live = live
        self._offsets: dict[int, int] = {} if start is None else start.as_dict()
        self._ends: dict[int, int] | None = None
        self._fetcher: Fetcher | None = None
        self._events: AsyncIterator[Event] | None = None
        self._closed = False

    @property
    def position(self) -> Position:
        """Behind the event that was handed out last."""
        return Position.of(self._offsets)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event; waits for it. Ends when the subscription or the engine is closed, and
        without `live` at what was the end when it began."""
        if self._events is None:
            self._events = self._read()
        return await anext(self._events)

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when none comes within so many seconds or the end is reached."""
        if self._events is None:
            self._events = self._read()
        waiting = asyncio.ensure_future(anext(self._events, None))
        try:
            done, _ = await asyncio.wait({waiting}, timeout=timeout)
        except BaseException:
            waiting.cancel()
            raise
        if done:
            return waiting.result()
        # An event that arrives from now on is kept for the next call.
        self._events = _first(waiting, self._events)
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop reading; who waits for an event waits no longer."""
        self._closed = True
        self._store.engine.forget(self)
        if self._fetcher is not None:
            await self._fetcher.close()

    # ---- reading

    async def _read(self) -> AsyncIterator[Event]:
        info = await self._store.info()
        partitions = range(len(info.partitions))
        name = self._filter.name
        if name is not None:
            partition = partition_for(name.encode(), len(info.partitions))
            partitions = range(partition, partition + 1)
        await self._find_ends(info)
        if name is not None and self._start is None and not self._from_now:
            async for event in self._stream_so_far(name, partitions[0]):
                yield event
        async for event in self._follow(info, partitions):
            yield event

    async def _find_ends(self, info: TopicInfo) -> None:
        if self._live and not self._from_now:
            return
        deadline = self._store.engine.deadline(None)
        found = await list_offsets(self._store.engine.cluster, info.name, deadline)
        ends = {partition: offsets.last_stable_offset for partition, offsets in found.items()}
        if self._from_now:
            self._offsets = ends
        if not self._live:
            self._ends = ends

    async def _stream_so_far(self, name: str, partition: int) -> AsyncIterator[Event]:
        """The stream by its index, up to where its partition stood at the first answer."""
        start, end = 0, None
        last = -1
        while not self._closed:
            page = await self._store.page(name, start)
            if end is None:
                end, last = page.head.stable, page.head.last
            for version, record in page.records:
                if version > last:
                    break
                event = self._store.decode(name, version, partition, record)
                self._offsets[partition] = record.offset + 1
                if self._filter.wants_type(event.event_type):
                    yield event
            if page.following is None or page.following > last:
                break
            start = page.following
        # A transaction that is open on other streams may have begun before the newest event here.
        self._offsets[partition] = max(end or 0, self._offsets.get(partition, 0))

    async def _follow(self, info: TopicInfo, partitions: range) -> AsyncIterator[Event]:
        engine = self._store.engine
        fetcher = self._fetcher = Fetcher(engine.cluster, required=[info.name])
        engine.started(self)
        try:
            fetcher.add(info, {p: self._offsets.setdefault(p, 0) for p in partitions})
            left = set(partitions)
            if self._ends is not None:
                left = {p for p in partitions if self._offsets[p] < self._ends[p]}
            while left and not self._closed:
                found = await fetcher.next_batches(None)
                if found is None:
                    return
                place, batches = found
                for batch in batches:
                    for event in self._events_of(place.partition, batch):
                        yield event
                        if self._closed:
                            return
                if self._ends is not None:
                    self._note_end(fetcher, place, left)
        finally:
            await fetcher.close()
            engine.forget(self)

    def _note_end(self, fetcher: Fetcher, place: TopicPartition, left: set[int]) -> None:
        """A partition is read to its end: it takes no room from the others."""
        ends = self._ends or {}
        if place.partition in left and fetcher.positions[place] >= ends[place.partition]:
            left.discard(place.partition)
            fetcher.hold(place, held=True)

    def _events_of(self, partition: int, batch: RecordColumns) -> Any:
        """The wanted events of one batch; the position moves on with each that is handed out."""
        end = None if self._ends is None else self._ends[partition]
        for event in events_of(partition, batch, self._filter.wants_stream, self._store.decode):
            following = (event.offset or 0) + 1
            if end is not None and following > end:
                break
            if self._filter.wants_type(event.event_type):
                self._offsets[partition] = following
                yield event
        self._offsets[partition] = batch.last_offset + 1


async def _first(waiting: asyncio.Future[Event | None], rest: AsyncIterator[Event]) -> Any:
    """An event that is on its way, and then the others."""
    event = await waiting
    if event is None:
        return
    yield event
    async for event in rest:
        yield event
