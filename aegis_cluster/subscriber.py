"""Reading topics: an async context manager, an async iterator, polls, and whole batches.

It starts on entering or on the first step, and `close()` ends it. Without a group it keeps no
positions: it reads every partition from `start` on. With one, its `Membership` says which
partitions it reads, and is told what was handed out and handled.

The idea: the fetcher below hands over records of one partition at a time; they wait here, not
decoded, until a program asks for the next one. So whatever is sought, paused or handed out again
happens between two messages, and a record that does not decode stops the reader right there.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster import arguments
from aegis_cluster.client.fetcher import Fetcher
from aegis_cluster.client.group_session import MemberConfig
from aegis_cluster.client.moments import offsets_at
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.errors import (
    AegisError,
    Corruption,
    CorruptRecord,
    Misuse,
    TopicNotFound,
)
from aegis_cluster.ids import TopicPartition
from aegis_cluster.membership import Membership
from aegis_cluster.message import (
    EPOCH,
    Offset,
    ReceivedMessage,
    from_columns,
    from_record,
    to_ms,
)
from aegis_cluster.subscribe_config import AckMode, DeliveryMode, SubscribeConfig
from aegis_cluster.wire.payload import decode_key, decode_keys, decode_payload, decode_payloads
from aegis_cluster.wire.protocol import Isolation
from aegis_cluster.wire.records import RecordColumns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from aegis_cluster.client.offsets import FoundOffsets
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.filters import EventFilter
    from aegis_cluster.transaction import TransactionalProducer
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.records import Record

DISCOVER_S: Final = 1.0
"""How often a subscription to a pattern looks for new topics."""
GROWTH_S: Final = 3.0
"""How often any other looks for new partitions of its topics."""
_WILDCARDS: Final = frozenset("*?[")


class MessageBatch:
    """Neighbouring messages of one partition as columns of equal length.

    timestamps: milliseconds since 1970. offsets rise; gaps are possible. Columns are lists; all
    but the values are made when they are first looked at.
    """

    __slots__ = ("_columns", "_keys", "_offsets", "_timestamps", "partition", "topic", "values")

    def __init__(
        self,
        topic: str,
        partition: int,
        offsets: list[int] | None,
        timestamps: list[int] | None,
        keys: list[str | bytes | None] | None,
        values: list[Any],
        columns: RecordColumns | None = None,
    ) -> None:
        """columns: where columns that are None come from."""
        self.topic = topic
        self.partition = partition
        self.values = values
        self._offsets = offsets
        self._timestamps = timestamps
        self._keys = keys
        self._columns = RecordColumns.of(()) if columns is None else columns

    def __len__(self) -> int:
        return len(self.values)

    @property
    def offsets(self) -> list[int]:
        """Rising; gaps are possible."""
        if self._offsets is None:
            self._offsets = self._columns.offsets
        return self._offsets

    @property
    def columns(self) -> RecordColumns:
        """As they are stored, headers included."""
        return self._columns

    @property
    def timestamps(self) -> list[int]:
        """Milliseconds since 1970."""
        if self._timestamps is None:
            self._timestamps = self._columns.timestamps
        return self._timestamps

    @property
    def keys(self) -> list[str | bytes | None]:
        """As they were published."""
        if self._keys is None:
            self._keys = [decode_key(key, ()) for key in self._columns.keys]
        return self._keys


@dataclass(slots=True, eq=False)
class _Block:
    """A fetched batch, and how many of its records were handed out."""

    place: TopicPartition
    columns: RecordColumns
    at: int = 0
    messages: Iterator[ReceivedMessage] | None = None
    """Those from `at` on, made one by one."""

    def next_message(self, source: Subscriber) -> ReceivedMessage | None:
        """None at the end. Raises `CorruptRecord`, again and again, where it does not decode."""
        if self.messages is None:
            left = self.columns.after(self.at)
            self.messages = from_columns(self.place.topic, self.place.partition, left, source)
        try:
            message = next(self.messages, None)
        except Corruption as error:
            self.messages = None  # it has moved on
            raise _undecodable(self.place, self.columns.offsets[self.at], error) from error
        if message is not None:
            self.at += 1
        return message

    def left(self) -> list[Record]:
        """What was not handed out yet."""
        return self.columns.after(self.at).records()


_Waiting = tuple[TopicPartition, "Record | ReceivedMessage"]


class Subscriber:
    """Messages of some topics, each partition in order; belongs to one event loop."""

    def __init__(
        self,
        engine: StreamingEngine,
        topics: Sequence[str],
        config: SubscribeConfig,
        timeout: float,
        *,
        max_poll_records: int,
        event_filter: EventFilter | None = None,
    ) -> None:
        self.on_assigned: Callable[[list[TopicPartition]], object] | None = None
        """Called, and awaited if it is async, when partitions have come, before their messages."""
        self.on_revoked: Callable[[list[TopicPartition]], object] | None = None
        """Called when partitions go, on close too: handlers have finished, positions are committed
        next."""
        self._engine = engine
        self._names = [name for name in topics if not _is_pattern(name)]
        self._patterns = [name for name in topics if _is_pattern(name)]
        self._config = config
        self._timeout = timeout
        self._max_poll_records = config.max_poll_records or max_poll_records
        self._filter = event_filter
        self._fetcher: Fetcher | None = None
        self._starting = asyncio.Lock()
        self._discovery: asyncio.Task[None] | None = None
        self._ready: deque[_Waiting] = deque()
        """What comes before the blocks: handed out again, or held back before."""
        self._blocks: deque[_Block] = deque()
        self._held: dict[TopicPartition, list[_Waiting]] = {}
        """What was fetched of partitions that are paused or wait for a repeat."""
        self._paused: set[TopicPartition] = set()
        self._delayed: dict[TopicPartition, float] = {}
        """When a partition goes on after `nack(delay)`, in the loop's time."""
        self._closed = False
        self._membership: Membership | None = None
        self._acks_by_asking = False
        self._claims = config.delivery_mode is DeliveryMode.AT_MOST_ONCE
        self._claimed: dict[TopicPartition, int] = {}
        """At most once: up to where messages may be handed out."""
        self._in_transactions = config.delivery_mode is DeliveryMode.EXACTLY_ONCE
        self._committer: TransactionalProducer | None = None
        """Whose transactions commit our positions, as far as we have seen."""
        self._reader_task: asyncio.Task[Any] | None = None
        """Which has asked for messages last."""
        self._must_go_back = False
        """A transaction was not committed: what it handled is handed out again."""
        self._polled: MessageBatch | None = None
        """What `poll_batch` has handed out last."""
        self._is_waiting = False
        self._loop: asyncio.AbstractEventLoop | None = None
        """The one on which it has started."""

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop reading; a step that waits ends."""
        self._closed = True
        self._engine.forget(self)
        if self._discovery is not None:
            self._discovery.cancel()
            await asyncio.gather(self._discovery, return_exceptions=True)
            self._discovery = None
        if self._membership is not None:
            await self._membership.close()
        if self._fetcher is not None:
            await self._fetcher.close()

    @property
    def is_closed(self) -> bool:
        """Nothing is handed out any more."""
        return self._closed

    # ---- messages

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ReceivedMessage:
        """The next message. Raises `OffsetOutOfRange`, `TopicNotFound`, `CorruptRecord` (again at
        every step, until `seek`)."""
        while not self._closed:
            if self._membership is not None:
                await self._asked(self._membership)
            message = self._next_ready()
            if message is not None:
                return message
            await self._fill(None)
        raise StopAsyncIteration

    async def poll(
        self, max_records: int | None = None, timeout: float | None = None
    ) -> list[ReceivedMessage]:
        """At most `max_records` messages (default: `max_poll_records`); empty when none came
        within `timeout` seconds. Raises what a step of the iterator does."""
        if self._closed:
            raise Misuse("This subscriber is closed; subscribe again.")
        limit = self._max_poll_records if max_records is None else max_records
        arguments.whole(limit, "max_records", least=1)
        wait_s = self._timeout if timeout is None else arguments.seconds(timeout)
        deadline = self._now() + wait_s
        found: list[ReceivedMessage] = []
        while not self._closed:
            if self._membership is not None:
                await self._asked(self._membership)
            self._take_ready(found, limit)
            if found or self._now() > deadline or not await self._fill(deadline):
                break
        return found

    async def batches(self) -> AsyncIterator[MessageBatch]:
        """Whole batches as columns, for speed; ends when the subscriber is closed.

        In a group a batch counts as handled when the next one is asked for, whatever the ack mode.
        Raises `Misuse` for a subscription with a filter, which looks at single messages.
        """
        if self._filter is not None:
            raise Misuse("batches() hands out whole batches; subscribe without a filter for it.")
        while not self._closed:
            if self._membership is not None:
                await self._asked(self._membership)
            if not self._ready and not self._blocks:
                await self._fill(None)
                continue
            batch = self._take_batch()
            if len(batch):
                self._batch_in_hand(batch)
                yield batch
                self._batch_done(batch)

    async def poll_batch(self, timeout: float | None = None) -> MessageBatch | None:
        """The next whole batch as columns, for speed; None when none came within `timeout` seconds.

        In a group a batch counts as handled when the next one is asked for, and when `commit` is
        called, whatever the ack mode; with EXACTLY_ONCE by `tx.send_offsets` only. Raises what
        `batches` and `poll` do.
        """
        if self._filter is not None:
            raise Misuse("poll_batch() hands out whole batches; subscribe without a filter for it.")
        if self._closed:
            raise Misuse("This subscriber is closed; subscribe again.")
        wait_s = self._timeout if timeout is None else arguments.seconds(timeout)
        deadline = self._now() + wait_s
        while not self._closed:
            if self._membership is not None:
                await self._asked(self._membership)
            self._polled_done()
            if not self._ready and not self._blocks:
                if self._now() > deadline or not await self._fill(deadline):
                    return None
                continue
            batch = self._take_batch()
            if len(batch):
                self._polled = batch
                self._batch_in_hand(batch)
                return batch
        return None

    # ---- where it stands

    @property
    def assignment(self) -> list[TopicPartition]:
        """The partitions that are read, in order; empty until started."""
        return sorted(self._fetcher.positions) if self._fetcher else []

    @property
    def positions(self) -> dict[int, int]:
        """Next offset to be handed out, by partition; of a subscription to one topic.

        Empty until started. Raises `Misuse` for several topics: see `position`.
        """
        if self._patterns or len(self._names) != 1:
            raise Misuse("This subscription has several topics; use position(partition).")
        return {place.partition: offset for place, offset in self._positions().items()}

    def position(self, partition: int | TopicPartition) -> int:
        """Next offset to be handed out of one partition. Raises `Misuse` if it is not read."""
        place = self._place(partition)
        positions = self._positions()
        if place not in positions:
            raise Misuse(f"{place} is not read here; see `assignment`.")
        return positions[place]

    def _positions(self) -> dict[TopicPartition, int]:
        positions = self._fetcher.positions if self._fetcher else {}
        waiting = [item for items in self._held.values() for item in items]
        for block in reversed(self._blocks):
            if block.place in positions and block.at < len(block.columns):
                positions[block.place] = block.columns.after(block.at).first_offset
        for place, item in reversed([*self._ready, *waiting]):
            if place in positions:
                positions[place] = item.offset
        return positions

    async def lag(self, *, timeout: float | None = None) -> dict[TopicPartition, int]:
        """How many offsets each partition has, as of now, that were not handed out yet.

        Raises `TopicNotFound`, `RequestTimeout`.
        """
        fetcher = await self._start()
        cluster = self._engine.cluster
        deadline = cluster.deadline(self._timeout if timeout is None else timeout)
        ends: dict[TopicPartition, int] = {}
        for topic in sorted({place.topic for place in fetcher.positions}):
            for number, offsets in (await list_offsets(cluster, topic, deadline)).items():
                ends[TopicPartition(topic, number)] = offsets.high_watermark
        return {
            place: max(0, ends[place] - offset)
            for place, offset in sorted(self._positions().items())
            if place in ends
        }

    # ---- control

    async def seek(
        self,
        partition: int | TopicPartition,
        offset: int | Offset,
        *,
        timeout: float | None = None,
    ) -> None:
        """Go on reading one partition from another offset, also past one that does not decode.

        partition: its number will do for a subscription to one topic. Raises `Misuse` if it is
        not read; reading raises `OffsetOutOfRange` if nothing is kept there.
        """
        fetcher = await self._start()
        place = self._place(partition)
        if isinstance(offset, Offset):
            cluster = self._engine.cluster
            deadline = cluster.deadline(self._timeout if timeout is None else timeout)
            asked = await offsets_at(cluster, place.topic, deadline, time_ms=offset.time_ms)
            found = asked.get(place.partition)
            if found is None:
                raise Misuse(f"{place} is not read here; see `assignment`.")
            target = offset.resolve(
                log_start=found.log_start,
                high_watermark=self._end_of(found),
                at_time=found.at_time,
            )
        else:
            target = Offset.at(offset).number
        fetcher.seek(place, target)
        self._drop(place)
        self._claimed.pop(place, None)
        if self._membership is not None:
            self._membership.moved_to(place, target)

    def pause(self, partitions: Iterable[int | TopicPartition] | None = None) -> None:
        """Hand out nothing more of these partitions (None: of all that are read now) until
        `resume`. Raises `Misuse` for one that is not read."""
        for place in self._places(partitions):
            self._paused.add(place)
            self._hold(place)

    def resume(self, partitions: Iterable[int | TopicPartition] | None = None) -> None:
        """Go on with these partitions (None: with all that are paused) where they stopped."""
        places = list(self._paused) if partitions is None else self._places(partitions)
        for place in sorted(places):
            self._paused.discard(place)
            self._let_go(place)

    def hand_out_again(self, message: ReceivedMessage, delay: float | None) -> None:
        """What `message.nack(delay)` calls."""
        place = TopicPartition(message.topic, message.partition)
        if self._closed or self._fetcher is None or place not in self._fetcher.positions:
            return
        self._spill()
        self._ready.appendleft((place, message))
        mine = sorted((item for item in self._ready if item[0] == place), key=_offset_of)
        others = [item for item in self._ready if item[0] != place]
        self._ready = deque([*mine, *others])
        if delay is not None and delay > 0:
            until = self._now() + delay
            self._delayed[place] = max(until, self._delayed.get(place, until))
        if place in self._delayed or place in self._paused:
            self._hold(place)

    def _hold(self, place: TopicPartition) -> None:
        self._reader().hold(place, held=True)
        self._spill()
        mine = [item for item in self._ready if item[0] == place]
        if mine:
            both = {_offset_of(item): item for item in [*mine, *self._held.get(place, [])]}
            self._held[place] = [both[offset] for offset in sorted(both)]
            self._ready = deque(item for item in self._ready if item[0] != place)

    def _let_go(self, place: TopicPartition) -> None:
        """Hand a partition out again, unless something else still holds it."""
        if place in self._paused or place in self._delayed:
            return
        self._ready.extendleft(reversed(self._held.pop(place, [])))
        reader = self._reader()
        if place in reader.positions:
            reader.hold(place, held=False)
        reader.wake()

    def _drop(self, place: TopicPartition) -> None:
        """Forget what is fetched of a partition."""
        self._spill()
        self._held.pop(place, None)
        self._ready = deque(item for item in self._ready if item[0] != place)

    def _reader(self) -> Fetcher:
        if self._fetcher is None:
            raise Misuse("This subscriber has not started; enter it with 'async with' first.")
        return self._fetcher

    def _places(self, partitions: Iterable[int | TopicPartition] | None) -> list[TopicPartition]:
        if partitions is None:
            return list(self._reader().positions)
        hint = "give a list of partitions"
        listed = arguments.many(partitions, "partitions", hint)
        places = [self._place(partition) for partition in listed]
        missing = [place for place in places if place not in self._reader().positions]
        if missing:
            raise Misuse(f"{missing[0]} is not read here; see `assignment`.")
        return places

    def _place(self, partition: int | TopicPartition) -> TopicPartition:
        if isinstance(partition, tuple):
            return TopicPartition(*partition)
        partition = arguments.whole(partition, "partition", least=0)
        if self._patterns or len(self._names) != 1:
            raise Misuse(
                f"This subscription has several topics; name TopicPartition(topic, {partition})."
            )
        return TopicPartition(self._names[0], partition)

    # ---- filling

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _next_ready(self) -> ReceivedMessage | None:
        """The next message that passes the filter; None when none is at hand."""
        while self._ready:
            place, item = self._ready[0]
            if self._claims and item.offset >= self._claimed.get(place, 0):
                return None
            message = self._decoded(place, item)
            self._ready.popleft()
            wanted = self._filter is None or self._filter.matches(message)
            if self._membership is not None:
                self._note(self._membership, place, message.offset, wanted=wanted)
            if wanted:
                return message
        while self._blocks:
            block = self._blocks[0]
            made = block.next_message(self)
            if made is None:
                self._blocks.popleft()
                continue
            message = made
            wanted = self._filter is None or self._filter.matches(message)
            if self._membership is not None:
                self._note(self._membership, block.place, message.offset, wanted=wanted)
            if wanted:
                return message
        return None

    def _spill(self) -> None:
        """Turn blocks into single records, which can be held back and put in any order."""
        for block in self._blocks:
            self._ready.extend((block.place, record) for record in block.left())
        self._blocks.clear()

    # ---- in a group

    async def _asked(self, membership: Membership) -> None:
        """The program asks for more. Raises what ended the membership."""
        membership.check()
        if self._in_transactions:
            self._reader_task = asyncio.current_task()
            if self._must_go_back:
                await self._go_back(membership)
        if self._acks_by_asking:
            membership.all_handled()
        if self._claims:
            self._spill()
            if self._ready:
                await self._claim(membership)

    async def _claim(self, membership: Membership) -> None:
        """At most once: commit the position behind what is handed out next, before it is."""
        place, first = self._ready[0]
        if first.offset < self._claimed.get(place, 0):
            return
        upto = first.offset + 1
        for count, (other, item) in enumerate(self._ready):
            if other != place or count >= self._max_poll_records:
                break
            upto = item.offset + 1
        await membership.claim(place, upto, self._now() + self._timeout)
        self._claimed[place] = upto

    def _note(
        self, membership: Membership, place: TopicPartition, offset: int, *, wanted: bool
    ) -> None:
        if wanted:
            membership.handed_out(place, offset)
        else:
            membership.passed(place, offset)

    def _polled_done(self) -> None:
        """The program is done with what `poll_batch` has handed out."""
        if self._polled is not None:
            self._batch_done(self._polled)
            self._polled = None

    def _batch_in_hand(self, batch: MessageBatch) -> None:
        if self._membership is not None and self._in_transactions:
            place = TopicPartition(batch.topic, batch.partition)
            self._membership.handed_out(place, batch.offsets[-1])

    def _batch_done(self, batch: MessageBatch) -> None:
        place = TopicPartition(batch.topic, batch.partition)
        if self._membership is not None and not self._in_transactions:
            self._membership.moved_to(place, batch.offsets[-1] + 1)

    # ---- in transactions

    @property
    def group_id(self) -> str:
        """Raises `Misuse` without a group."""
        if self._config.group_id is None:
            raise Misuse("Only a subscriber of a group has positions.")
        return self._config.group_id

    @property
    def member_id(self) -> str | None:
        """Of this member of its group; None while it is in none."""
        return None if self._membership is None else self._membership.member_id

    def is_committed_by(self, owner: TransactionalProducer) -> None:
        """Transactions of this producer handle what is handed out here. Raises `Misuse`."""
        if not self._in_transactions:
            raise Misuse(
                "A transaction takes positions of a subscriber in a group with"
                " delivery_mode=DeliveryMode.EXACTLY_ONCE, so that nothing else commits them."
            )
        self._committer = owner

    def positions_in_hand(self, *, unmoved: bool = False) -> dict[TopicPartition, int]:
        """Where each partition goes on once all that was handed out is handled; unmoved: also of
        those that have not moved since their last commit. Raises `MemberFenced`, `Misuse`."""
        if self._must_go_back:
            raise Misuse(
                "The last transaction was not committed, so what it handled is handed out again:"
                " take messages anew, and send the offsets of those."
            )
        if self._membership is None:
            return {}
        return self._membership.moved_since_commit(self._positions(), unmoved=unmoved)

    async def commit_within(
        self, producer: Sequence[int], positions: Mapping[TopicPartition, int], deadline: float
    ) -> None:
        """Make positions a part of the transaction of this producer id and epoch. Raises
        `MemberFenced`, `ProducerFenced`, `RequestTimeout`, `OutcomeUnknown`."""
        if self._membership is not None:
            await self._membership.commit_within(producer, positions, deadline)

    def committed_within(self, positions: Mapping[TopicPartition, int]) -> None:
        """The transaction is committed."""
        if self._membership is not None:
            self._membership.committed_within(positions)

    def go_back_for(self, owner: TransactionalProducer) -> None:
        """A transaction of this producer was not committed, for all we know; if it was ours, the
        next step begins at the group's positions again."""
        if not self._in_transactions or self._committer not in (None, owner):
            return
        if self._committer is None and self._reader_task is not asyncio.current_task():
            return  # another task reads, with a producer that we have not seen yet
        self._must_go_back = True

    async def _go_back(self, membership: Membership) -> None:
        """Read on from what is committed, once that is settled."""
        deadline = self._now() + self._timeout
        if self._committer is not None:
            await self._committer.ready(deadline)  # ends what may be left open
        for place, offset in (await membership.go_back(deadline)).items():
            self._reader().seek(place, offset)
            self._drop(place)
        self._must_go_back = False

    def handled(self, message: ReceivedMessage) -> None:
        """What `message.ack()` calls; in transactions it is `send_offsets` that counts."""
        if self._membership is not None and not self._in_transactions:
            self._membership.handled(
                TopicPartition(message.topic, message.partition), message.offset
            )

    async def commit(self, *, timeout: float | None = None) -> None:
        """Commit now how far handlers have come, rather than soon.

        Raises `Misuse` without a group; `MemberFenced` when the group has lost this member: what
        was not committed is handed out again, to whoever holds the partition; `OffsetOutOfRange`,
        with nothing committed, when it has sought beyond the end; `RequestTimeout`,
        `OutcomeUnknown`.
        """
        if self._membership is None:
            raise Misuse("Only a subscriber of a group has positions to commit.")
        if self._in_transactions:
            raise Misuse("With EXACTLY_ONCE, positions are committed by tx.send_offsets only.")
        self._polled_done()
        deadline = self._engine.cluster.deadline(self._timeout if timeout is None else timeout)
        await self._membership.commit(deadline)

    @property
    def is_waiting(self) -> bool:
        """The program waits for a message at the moment."""
        return self._is_waiting

    def begin(self, positions: Mapping[TopicPartition, int]) -> None:
        """What the membership calls when partitions have come."""
        fetcher = self._reader()
        topics = self._engine.cluster.metadata.topics
        skip_before_ms = self._config.start.time_ms
        for place, offset in positions.items():
            at = {place.partition: offset}
            fetcher.add(topics[place.topic], at, skip_before_ms=skip_before_ms)

    def stop(self, places: Iterable[TopicPartition]) -> None:
        """What the membership calls when partitions go, or when it has ended."""
        fetcher = self._reader()
        gone = set(places)
        fetcher.remove_places(gone)
        for place in gone:
            self._drop(place)
            self._paused.discard(place)
            self._delayed.pop(place, None)
            self._claimed.pop(place, None)
        fetcher.wake()

    def _take_ready(self, found: list[ReceivedMessage], limit: int) -> None:
        """Move messages over; what does not decode is told when it comes first."""
        while len(found) < limit:
            try:
                message = self._next_ready()
            except Corruption:
                if found:
                    return
                raise
            if message is None:
                return
            found.append(message)

    def _decoded(self, place: TopicPartition, item: Record | ReceivedMessage) -> ReceivedMessage:
        if isinstance(item, ReceivedMessage):
            return item
        try:
            return from_record(place.topic, place.partition, item, self)
        except Corruption as error:
            raise _undecodable(place, item.offset, error) from error

    def _take_batch(self) -> MessageBatch:
        """What is ready of the first partition."""
        if not self._ready:
            block = self._blocks.popleft()
            batch = _batch_of(block)
            if batch is not None:
                return batch
            self._blocks.appendleft(block)
            self._spill()
        place = self._ready[0][0]
        offsets: list[int] = []
        timestamps: list[int] = []
        keys: list[str | bytes | None] = []
        values: list[Any] = []
        while self._ready and self._ready[0][0] == place:
            item = self._ready[0][1]
            try:
                row = _columns(item)
            except Corruption as error:
                if offsets:
                    break
                raise _undecodable(place, item.offset, error) from error
            self._ready.popleft()
            time_ms, key, value = row
            offsets.append(item.offset)
            timestamps.append(time_ms)
            keys.append(key)
            values.append(value)
        return MessageBatch(place.topic, place.partition, offsets, timestamps, keys, values)

    async def _fill(self, deadline: float | None) -> bool:
        """Wait for records of some partition; False when the deadline has passed or it closed."""
        try:
            fetcher = await self._start()
        except AegisError:
            if self._closed:  # meanwhile, and the engine with it
                return False
            raise
        self._check_loop()
        self._end_delays()
        if self._ready or self._blocks:
            return True
        until = [*self._delayed.values(), *([] if deadline is None else [deadline])]
        self._is_waiting = True
        try:
            found = await fetcher.next_batches(min(until, default=None))
        finally:
            self._is_waiting = False
        if found is not None:
            place, batches = found
            self._blocks.extend(_Block(place, columns) for columns in batches)
            return True
        self._end_delays()
        return not self._closed and (deadline is None or self._now() < deadline)

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise Misuse(
                "This subscriber belongs to another event loop. Subscribe on an engine of this"
                " one, or use aegis_cluster.sync, whose engine may be called from any thread."
            )

    def _end_delays(self) -> None:
        now = self._now()
        for place in [place for place, until in self._delayed.items() if until <= now]:
            del self._delayed[place]
            self._let_go(place)

    # ---- starting, and topics that come and go

    async def _start(self) -> Fetcher:
        async with self._starting:
            if self._closed:
                raise Misuse("This subscriber is closed; subscribe again.")
            if self._fetcher is None:
                self._engine.started(self)  # from here on its end is ours too
                try:
                    await self._follow()
                except BaseException:
                    if self._fetcher is None:
                        self._engine.forget(self)
                    raise
        return self._reader()

    async def _follow(self) -> None:
        self._loop = asyncio.get_running_loop()
        cluster = self._engine.cluster
        deadline = cluster.deadline(self._timeout)
        infos = {name: await cluster.topic(name, deadline) for name in self._names}
        if self._config.group_id is not None:
            await self._join(self._config.group_id, deadline)
            return
        if self._patterns:
            await cluster.refresh(None, deadline)
            infos |= self._matching()
        starts = [
            (info, await self._positions_of(info, self._config.start, deadline))
            for info in infos.values()
        ]
        fetcher = Fetcher(cluster, required=self._names, isolation=self._config.sees)
        for info, positions in starts:
            fetcher.add(info, positions, skip_before_ms=self._config.start.time_ms)
        self._fetcher = fetcher
        if self._closed:  # meanwhile
            await fetcher.close()
            return
        self._discovery = asyncio.get_running_loop().create_task(self._discover(fetcher))

    async def _join(self, group: str, deadline: float) -> None:
        """Be a member of the group; it says what is read."""
        config, defaults = self._config, self._engine.settings.consumer
        ack_mode = config.ack_mode or (AckMode.AUTO if defaults.auto_commit else AckMode.MANUAL)
        self._acks_by_asking = ack_mode is AckMode.AUTO and not self._in_transactions
        self._fetcher = Fetcher(self._engine.cluster, required=(), isolation=config.sees)
        self._membership = membership = Membership(
            cluster=self._engine.cluster,
            background=self._engine.background(),
            config=MemberConfig(
                group=group,
                name=config.member_id or f"member-{uuid.uuid4().hex}",
                static=config.member_id is not None,
                topics=(*self._names, *self._patterns),
                session_timeout_ms=config.session_timeout_ms(defaults.session_timeout_ms),
            ),
            start=config.start,
            keeps_positions=ack_mode is not AckMode.NONE or self._in_transactions,
            in_transactions=self._in_transactions,
            timeout=self._timeout,
            reading=self,
            on_assigned=self._call_assigned,
            on_revoked=self._call_revoked,
        )
        await membership.join(deadline)

    async def _call_assigned(self, places: list[TopicPartition]) -> None:
        await _call(self.on_assigned, places)

    async def _call_revoked(self, places: list[TopicPartition]) -> None:
        await _call(self.on_revoked, places)

    def _matching(self) -> dict[str, TopicInfo]:
        """Known topics whose name one of the patterns matches."""
        topics = self._engine.cluster.metadata.topics
        return {
            name: topics[name]
            for name in sorted(topics)
            if not name.startswith("__")
            and any(fnmatchcase(name, pattern) for pattern in self._patterns)
        }

    async def _positions_of(
        self, info: TopicInfo, start: Offset, deadline: float
    ) -> dict[int, int]:
        found = await list_offsets(self._engine.cluster, info.name, deadline, time_ms=start.time_ms)
        return {
            partition: start.resolve(
                log_start=offsets.log_start,
                high_watermark=self._end_of(offsets),
                at_time=offsets.at_time,
            )
            for partition, offsets in found.items()
        }

    def _end_of(self, offsets: FoundOffsets) -> int:
        """Where "from now on" begins: at a transaction's start, or only its rest would be seen."""
        if self._config.sees is Isolation.UNCOMMITTED:
            return offsets.high_watermark
        return offsets.last_stable_offset

    async def _discover(self, fetcher: Fetcher) -> None:
        """Look for new topics and partitions again and again; what is new is read from its
        beginning."""
        while True:
            await asyncio.sleep(DISCOVER_S if self._patterns else GROWTH_S)
            try:
                await self._look_for_topics(fetcher)
            except AegisError:
                continue  # nobody answers at the moment; reading says so if it lasts

    async def _look_for_topics(self, fetcher: Fetcher) -> None:
        cluster = self._engine.cluster
        deadline = cluster.deadline(self._timeout)
        await cluster.refresh(None if self._patterns else self._names, deadline)
        known = cluster.metadata.topics
        followed = {name: known[name] for name in self._names if name in known} | self._matching()
        for name, info in followed.items():
            group = fetcher.group_of(name)
            is_same = group == info.partitions[0].group
            if is_same and len(info.partitions) == fetcher.partitions_of(name):
                continue
            if not is_same and name in self._names:
                continue  # deleted: the fetcher says so
            try:
                positions = await self._positions_of(info, Offset.EARLIEST, deadline)
            except TopicNotFound:
                continue
            if is_same:
                count = fetcher.partitions_of(name)
                positions = {number: at for number, at in positions.items() if number >= count}
            elif group is not None:
                fetcher.remove(name)
            fetcher.add(info, positions)


async def _call(
    callback: Callable[[list[TopicPartition]], object] | None, places: list[TopicPartition]
) -> None:
    """A user's callback, plain or async."""
    result = callback(places) if callback is not None and places else None
    if asyncio.iscoroutine(result):
        await result


def _is_pattern(name: str) -> bool:
    return not _WILDCARDS.isdisjoint(name)


def _offset_of(item: _Waiting) -> int:
    return item[1].offset


def _batch_of(block: _Block) -> MessageBatch | None:
    """The rest of a block as columns; None where one of its records does not decode."""
    place, columns = block.place, block.columns.after(block.at) if block.at else block.columns
    values = columns.values
    if not columns.has_headers:
        return MessageBatch(place.topic, place.partition, None, None, None, values, columns)
    try:
        decoded = decode_payloads(values, columns.headers)
        keys = decode_keys(columns.keys, columns.headers)
    except Corruption:
        return None
    return MessageBatch(place.topic, place.partition, None, None, keys, decoded, columns)


def _columns(item: Record | ReceivedMessage) -> tuple[int, str | bytes | None, Any]:
    if isinstance(item, ReceivedMessage):
        return to_ms(item.timestamp or EPOCH), item.key, item.payload
    headers = item.headers
    return item.timestamp_ms, decode_key(item.key, headers), decode_payload(item.value, headers)


def _undecodable(place: TopicPartition, offset: int, error: Corruption) -> CorruptRecord:
    return CorruptRecord(
        f"The message at offset {offset} of {place} does not decode: {error}. Seek past it to"
        " read on.",
        topic=place.topic,
        partition=place.partition,
        offset=offset,
    )
