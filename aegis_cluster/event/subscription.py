"""Following events: what is there first, then what comes, each once and in its stream's order.

The idea: events are records of a log, so a subscription reads logs and leaves out what it was not
asked for. Where it has come to is one offset for each partition, a *position*; whoever goes on from
there misses nothing and sees nothing twice. One whole stream begins with its own events, by the
index, instead of with the whole log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import Misuse
from aegis_cluster.event.names import check_stream
from aegis_cluster.wire.event_frames import SYSTEM_PREFIX
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
    from types import TracebackType

    from aegis_cluster.event.model import Event
    from aegis_cluster.event.store import EventStore
    from aegis_cluster.ids import TopicPartition
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.records import RecordColumns

ALL: Final = "*"
PIECE_EVENTS: Final = 256
"""Decoded at one time: about two milliseconds' work."""


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
        if types is not None and not isinstance(types, Collection):
            raise Misuse(f"event_types = {types!r}: give names of types, or None for all.")
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


class _Piece(NamedTuple):
    """Events of one partition that are handed out next; end: where it goes on behind them."""

    partition: int
    events: list[Event]
    end: int


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
        self._pieces: AsyncGenerator[_Piece] | None = None
        self._coming: asyncio.Future[_Piece | None] | None = None
        """The next piece, asked for and not taken: kept when who asked for it stops waiting."""
        self._ready: Iterator[Event] = iter(())
        self._partition = 0
        """Of what is ready."""
        self._end: int | None = None
        """Where its partition goes on behind all that is ready."""
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
        while True:
            for event in self._ready:
                self._offsets[self._partition] = event.offset + 1  # type: ignore[operator]
                return event
            if not await self._more(None):
                raise StopAsyncIteration

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when none comes within so many seconds or the end is reached."""
        until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        while True:
            for event in self._ready:
                self._offsets[self._partition] = event.offset + 1  # type: ignore[operator]
                return event
            if not await self._more(until):
                return None

    async def poll(self, max_events: int = 500, timeout: float | None = None) -> list[Event]:
        """The next events, as many as are at hand but no more than `max_events`; waits for the
        first one. An empty list: none came within so many seconds, or the end is reached."""
        first = await self.next(timeout)
        if first is None:
            return []
        found = [first]
        while len(found) < max_events:
            more = list(islice(self._ready, max_events - len(found)))
            if more:
                found += more
                self._offsets[self._partition] = more[-1].offset + 1  # type: ignore[operator]
            elif not await self._more(0.0):
                break
        return found

    async def _more(self, until: float | None) -> bool:
        """Have the next piece ready; False at the end, or when none comes until then."""
        self._all_handed_out()
        if self._closed:
            return False
        if self._pieces is None:
            self._store.engine.started(self)  # from here on its end is ours too
            self._pieces = self._read()
        if self._coming is None:
            self._coming = asyncio.ensure_future(anext(self._pieces, None))
        left = None if until is None else max(0.0, until - asyncio.get_running_loop().time())
        done, _ = await asyncio.wait({self._coming}, timeout=left)
        if not done or self._closed:
            return False
        coming, self._coming = self._coming, None
        piece = None
        try:
            piece = coming.result()
        finally:
            if piece is None:  # the end, or what ended it is raised
                self._store.engine.forget(self)
        if piece is None:
            return False
        self._partition, self._ready, self._end = piece.partition, iter(piece.events), piece.end
        return True

    def _all_handed_out(self) -> None:
        if self._end is not None:
            self._offsets[self._partition], self._end = self._end, None

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
        self._ready, self._end = iter(()), None
        self._store.engine.forget(self)
        if self._fetcher is not None:
            await self._fetcher.close()
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.wait({self._coming})
        elif self._pieces is not None:
            await self._pieces.aclose()

    # ---- reading

    async def _read(self) -> AsyncGenerator[_Piece]:
        info = await self._store.info()
        partitions = range(len(info.partitions))
        name = self._filter.name
        if name is not None:
            partition = partition_for(name.encode(), len(info.partitions))
            partitions = range(partition, partition + 1)
        await self._find_ends(info)
        begin = dict(self._offsets)
        if name is not None and self._start is None and not self._from_now:
            async for piece in self._stream_so_far(name, partitions[0]):
                yield piece
                begin[piece.partition] = piece.end
        async for piece in self._follow(info, {p: begin.get(p, 0) for p in partitions}):
            yield piece

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

    async def _stream_so_far(self, name: str, partition: int) -> AsyncGenerator[_Piece]:
        """The stream by its index, up to where its partition stood at the first answer."""
        start, end, last = 0, 0, -1
        behind = 0
        while not self._closed:
            page = await self._store.page(name, start)
            if not end and last < 0:
                end, last = page.head.stable, page.head.last
            events = [
                self._store.decode(name, version, partition, record)
                for version, record in page.records
                if version <= last
            ]
            behind = max([behind, *(record.offset + 1 for _, record in page.records[-1:])])
            yield _Piece(partition, self._of_types(events), behind)
            if page.following is None or page.following > last:
                break
            start = page.following
        # A transaction that is open on other streams may have begun before the newest event here.
        yield _Piece(partition, [], max(end, behind))

    async def _follow(self, info: TopicInfo, begin: Mapping[int, int]) -> AsyncGenerator[_Piece]:
        fetcher = self._fetcher = Fetcher(self._store.engine.cluster, required=[info.name])
        try:
            fetcher.add(info, begin)
            left = set(begin)
            if self._ends is not None:
                left = {p for p in begin if begin[p] < self._ends[p]}
            while left and not self._closed:
                found = await fetcher.next_batches(None)
                if found is None:
                    return
                place, batches = found
                for piece in self._pieces_of(place.partition, batches):
                    yield piece
                if self._ends is not None:
                    self._note_end(fetcher, place, left)
        finally:
            await fetcher.close()

    def _note_end(self, fetcher: Fetcher, place: TopicPartition, left: set[int]) -> None:
        """A partition is read to its end: it takes no room from the others."""
        ends = self._ends or {}
        if place.partition in left and fetcher.positions[place] >= ends[place.partition]:
            left.discard(place.partition)
            fetcher.hold(place, held=True)

    def _pieces_of(self, partition: int, batches: Iterable[RecordColumns]) -> Iterator[_Piece]:
        """The wanted events of these batches, some hundred at a time."""
        stop = None if self._ends is None else self._ends[partition]
        store, wanted = self._store, self._filter.wants_stream
        found: list[Event] = []
        end = 0
        for batch in batches:
            if stop is not None and batch.first_offset >= stop:
                break
            found += store.decode_all(partition, batch, wanted)
            end = batch.last_offset + 1
            if len(found) >= PIECE_EVENTS:
                yield _Piece(partition, self._of_types(found), end)
                found, end = [], 0
        if end:
            yield _Piece(partition, self._of_types(found), end)

    def _of_types(self, events: list[Event]) -> list[Event]:
        types = self._filter.types
        return events if types is None else [one for one in events if one.event_type in types]
