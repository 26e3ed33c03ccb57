"""The event store as a program uses it.

The idea: a stream belongs to one partition by murmur2 of its name, and the partition's leader
decides about versions; so appends to one stream are one order, and streams do not wait for each
other. The topic is made on first use.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from aegis_cluster.client.event_transactions import EventTransactions, Part
from aegis_cluster.client.events import EventLink
from aegis_cluster.client.offsets import list_offsets
from aegis_cluster.config import parse_duration
from aegis_cluster.errors import AegisError, InvalidTopic, MessageTooLarge, Misuse
from aegis_cluster.event.codec import events_of, from_record, to_rows
from aegis_cluster.event.consumer import EventConsumer
from aegis_cluster.event.model import Appended, Event, ExpectedVersion, StreamInfo
from aegis_cluster.event.names import check_stream
from aegis_cluster.event.subscription import EventSubscription, Filter, Position
from aegis_cluster.limits import (
    BATCH_BYTES_MAX,
    EVENTS_PER_APPEND_MAX,
    KIB,
    MIB,
    STREAMS_PER_APPEND_MAX,
)
from aegis_cluster.topics import UNLIMITED, TopicConfig
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.descriptions import EVENT_STORE
from aegis_cluster.wire.event_frames import (
    DELETED,
    MAX_AGE_MS,
    MAX_COUNT,
    SETTINGS_PREFIX,
    TOMBSTONE,
)
from aegis_cluster.wire.partitioner import partition_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable, Sequence

    from aegis_cluster.client.events import Page, Placed, StreamHead
    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.event.aggregate import AggregateRoot
    from aegis_cluster.event.subjects import SubjectKeys
    from aegis_cluster.persistent import PersistentConfig
    from aegis_cluster.wire.batch import Row
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.records import Record, RecordColumns

    A = TypeVar("A", bound=AggregateRoot)

Upcaster: TypeAlias = Callable[[Event], Event]

TOPIC: Final = "events"
PARTITIONS: Final = 8
RECORD_OVERHEAD_BYTES: Final = 4_096
FRAMING_BYTES: Final = 100
"""Of one event in a batch, names of headers included."""
VERSION_MAX: Final = 2**63 - 1
EXPECTED_WORDS: Final = frozenset(map(int, ExpectedVersion))
SNAPSHOT_TYPE: Final = "Snapshot"
DECISION_TYPE: Final = "Decided"
CONDITION_TYPE: Final = "Expected"
DECISIONS_LOOKED_AT: Final = 10
"""From the newest on, for a snapshot; further back loading all events is not worse."""
UPCASTS_MAX: Final = 20
"""Of one event, each to another type."""
SCAN_EVENT_BYTES: Final = 1_024
SCAN_BYTES_MIN: Final = 64 * KIB
SCAN_BYTES_MAX: Final = 1 * MIB


log = logging.getLogger(__name__)


class EventStore:
    """Streams of events on one topic of an engine; belongs to the engine's event loop."""

    def __init__(
        self,
        engine: StreamingEngine,
        topic: str = TOPIC,
        *,
        partitions: int = PARTITIONS,
        upcasters: Mapping[str, Upcaster] | None = None,
        snapshot_every: int | None = None,
        subject_keys: SubjectKeys | None = None,
    ) -> None:
        """topic: made with so many partitions on first use, unless it is there; its partitions must
        never be changed, or streams would be looked for where they are not.

        upcasters: by event type, what makes an event of today of one that was stored long ago; one
        that changes the type is followed by that type's. snapshot_every: `save` keeps the state of
        an aggregate each time its stream has so many more events. subject_keys: of the persons that
        events are about.
        """
        if snapshot_every is not None and (_whole("snapshot_every", snapshot_every) or 0) < 1:
            raise Misuse("snapshot_every = 0: use a number from 1 on, or None.")
        self._upcasters = dict(upcasters or {})
        self._snapshot_every = snapshot_every
        self._keys = subject_keys
        self._engine = engine
        self._topic = topic
        self._partitions = partitions
        self._link: EventLink | None = None
        self._transactions: EventTransactions | None = None

    @property
    def topic(self) -> str:
        """Where the events are."""
        return self._topic

    @property
    def engine(self) -> StreamingEngine:
        """What it stands on."""
        return self._engine

    # ---- appending

    async def append(
        self,
        stream: str,
        events: Event | Iterable[Event],
        *,
        expected_version: int | Appended = ExpectedVersion.ANY,
        timeout: float | None = None,
    ) -> Appended:
        """Append events to a stream, all of them or none; they get its next versions.

        expected_version: the version of the stream's last event, or an `ExpectedVersion`. An append
        of the same events again (by their ids) appends nothing and gives the first answer, as long
        as they are among the newest 65,536 events of the partition.

        Raises `WrongExpectedVersion` (`.expected`, `.actual`), `StreamDeleted`, `MessageTooLarge`,
        `UnsupportedPayload`, `Misuse`, `RequestTimeout`, `OutcomeUnknown`.
        """
        found = await self.append_many(
            {stream: events}, {stream: expected_version}, timeout=timeout
        )
        return found[stream]

    async def append_many(
        self,
        events: Mapping[str, Event | Iterable[Event]],
        expected_versions: Mapping[str, int | Appended] | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, Appended]:
        """Append to several streams in one step: all of it or nothing.

        expected_versions: by stream; one that is not named may be at any version, and one that is
        named here and not in `events` is a condition only. Streams of one partition
        (`partition_of`) take one commit; those of several take a transaction, and are held until it
        ends: who reads or appends to one of them meanwhile waits, for milliseconds. Raises as
        `append` does.
        """
        deadline = self._engine.deadline(timeout)
        info = await self._info(deadline)
        _check_mapping("events", events)
        _check_mapping("expected_versions", expected_versions or {})
        expected = {name: _version(version) for name, version in (expected_versions or {}).items()}
        chosen = {name: _events(name, given) for name, given in events.items()}
        names = [*chosen, *(name for name in expected if name not in chosen)]
        if not chosen:
            raise Misuse("An append needs at least one event.")
        by_partition: defaultdict[int, list[str]] = defaultdict(list)
        for name in names:
            check_stream(name)
            by_partition[partition_for(name.encode(), len(info.partitions))].append(name)
        parts = {
            partition: self._part(some, chosen, expected, info)
            for partition, some in by_partition.items()
        }
        placed = await self._append_parts(parts, deadline)
        found = {}
        for partition, done in placed.items():
            offset = done.offset
            streams = [name for name in by_partition[partition] if name in chosen]
            for name, (first, last) in zip(streams, done.versions, strict=False):
                found[name] = Appended(name, first, last, partition, offset)
                offset += last - first + 1
        return {name: found[name] for name in chosen}

    def _part(
        self,
        names: Sequence[str],
        chosen: Mapping[str, list[Event]],
        expected: Mapping[str, int],
        info: TopicInfo,
    ) -> Part:
        """What is appended to streams of one partition."""
        rows: list[list[Any]] = []
        records: list[Row] = []
        if len(names) > STREAMS_PER_APPEND_MAX:
            raise MessageTooLarge(
                f"An append to {len(names)} streams of one partition is over the limit of"
                f" {STREAMS_PER_APPEND_MAX}. Append to fewer at a time.",
                have=len(names),
                at_most=STREAMS_PER_APPEND_MAX,
            )
        for name in names:
            listed = chosen.get(name, [])
            ids = b"".join(event.id_bytes for event in listed)
            _check_ids(name, listed)
            rows.append([name, expected.get(name, ExpectedVersion.ANY), ids, None])
            records += to_rows(name, listed, self._keys)
        is_condition = not records
        if is_condition:  # a log holds streams by a record
            event, beside = Event(CONDITION_TYPE), SETTINGS_PREFIX + names[0]
            rows.append([beside, ExpectedVersion.ANY, event.id_bytes, {}])
            records += to_rows(beside, [event], self._keys)
        _check_sizes(records, info)
        return Part(rows, records, is_condition)

    async def _append_parts(
        self, parts: Mapping[int, Part], deadline: float
    ) -> Mapping[int, Placed]:
        if len(parts) > 1:
            if self._transactions is None:
                cluster = self._engine.cluster
                self._transactions = EventTransactions(cluster, self._topic, self._events)
            return await self._transactions.append(parts, deadline)
        ((partition, part),) = parts.items()
        batch = encode_batch(part.records)
        return {partition: await self._events.append(partition, part.rows, batch, deadline)}

    async def partition_of(self, stream: str, *, timeout: float | None = None) -> int:
        """The partition that holds a stream. Raises `Misuse`, `RequestTimeout`."""
        check_stream(stream)
        info = await self._info(self._engine.deadline(timeout))
        return partition_for(stream.encode(), len(info.partitions))

    # ---- reading

    async def load(
        self,
        stream: str,
        *,
        from_version: int | None = None,
        backwards: bool = False,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> list[Event]:
        """Events of a stream as of now, in the order of their versions; none if there is no such.

        from_version: the first one (default: the oldest; backwards: the newest). limit: so many at
        most. Raises `Misuse`, `RequestTimeout`, `Corruption`.
        """
        pages = self.read(
            stream, from_version=from_version, backwards=backwards, limit=limit, timeout=timeout
        )
        return [event async for event in pages]

    async def read(
        self,
        stream: str,
        *,
        from_version: int | None = None,
        backwards: bool = False,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Event]:
        """As `load`, a piece at a time, for streams that are long."""
        check_stream(stream)
        start, left = _whole("from_version", from_version), _whole("limit", limit)
        deadline = self._engine.deadline(timeout)
        partition = partition_for(stream.encode(), len((await self._info(deadline)).partitions))
        while left is None or left > 0:
            page = await self._events.read(
                partition, stream, start, left, deadline, backwards=backwards
            )
            for version, record in page.records:
                yield self.decode(stream, version, partition, record)
            if page.following is None or page.following < 0:
                return
            start = page.following
            left = None if left is None else left - len(page.records)

    async def describe(self, stream: str, *, timeout: float | None = None) -> StreamInfo:
        """How far a stream is. Raises `Misuse`, `RequestTimeout`."""
        check_stream(stream)
        head = await self._head(stream, self._engine.deadline(timeout))
        return StreamInfo(stream, head.last, head.before, head.deleted == 1, head.deleted == 2)

    async def delete(
        self,
        stream: str,
        *,
        for_ever: bool = False,
        expected_version: int | Appended = ExpectedVersion.ANY,
        timeout: float | None = None,
    ) -> None:
        """Hide what a stream has; the next append begins it anew, with the versions that follow.

        for_ever: leave a tombstone, so that nothing is ever appended to that name again. Positions
        and other streams do not change; subscriptions that read the log still meet the events.
        Raises `WrongExpectedVersion`, `RequestTimeout`, `OutcomeUnknown`.
        """
        marks = {TOMBSTONE: True} if for_ever else {DELETED: True}
        await self._decide(stream, marks, _version(expected_version), timeout)

    async def configure(
        self,
        stream: str,
        *,
        max_count: int | None = None,
        max_age: str | timedelta | None = None,
        timeout: float | None = None,
    ) -> None:
        """Show only the newest `max_count` events of a stream, and none that was appended longer
        than `max_age` ago (`"30d"`); None: without that limit. `load` and `read` leave the others
        out, whose versions stay theirs. Raises `Misuse`, `RequestTimeout`, `OutcomeUnknown`."""
        count = _whole("max_count", max_count)
        marks = {MAX_COUNT: count, MAX_AGE_MS: _age_ms(max_age)}
        await self._decide(stream, marks, ExpectedVersion.ANY, timeout)

    async def _decide(
        self, stream: str, marks: dict[str, Any], expected: int, timeout: float | None
    ) -> None:
        """Append to the stream that holds what was decided about this one."""
        check_stream(stream)
        event = Event(DECISION_TYPE, marks)
        rows = [
            [stream, expected, b"", None],
            [SETTINGS_PREFIX + stream, ExpectedVersion.ANY, event.id_bytes, marks],
        ]
        await self._append_beside(stream, event, rows, self._engine.deadline(timeout))

    async def _append_beside(
        self, stream: str, event: Event, rows: list[list[Any]], deadline: float
    ) -> None:
        """Append to the stream that holds what is known about another one."""
        info = await self._info(deadline)
        partition = partition_for(stream.encode(), len(info.partitions))
        records = to_rows(SETTINGS_PREFIX + stream, [event], self._keys)
        _check_sizes(records, info)
        await self._events.append(partition, rows, encode_batch(records), deadline)

    async def _head(self, stream: str, deadline: float) -> StreamHead:
        partition = partition_for(stream.encode(), len((await self._info(deadline)).partitions))
        return (await self._events.read(partition, stream, None, 0, deadline)).head

    def decode(self, stream: str, version: int, partition: int, record: Record) -> Event:
        """The event that a record holds, as it is today. Raises `CorruptRecord`, `Misuse`."""
        return self._today(from_record(stream, version, partition, record, self._keys))

    def decode_all(
        self, partition: int, batch: RecordColumns, wanted: Callable[[str], bool] | None = None
    ) -> list[Event]:
        """The events of one batch of a log; wanted: whether those of a stream are. Raises as
        `decode`."""
        events = events_of(partition, batch, wanted, self._keys)
        return list(map(self._today, events)) if self._upcasters else events

    def _today(self, event: Event) -> Event:
        for _ in range(UPCASTS_MAX):
            upcaster = self._upcasters.get(event.event_type)
            if upcaster is None:
                return event
            before = event.event_type
            event = upcaster(event)
            if not isinstance(event, Event):
                raise Misuse(f"The upcaster of {before!r} returned no event.")
            if event.event_type == before:
                return event
        raise Misuse(f"The upcasters of {event.event_type!r} lead round in circles.")

    async def scan(
        self, partition: int, offset: int, count: int, *, wait_ms: int = 0
    ) -> list[Event]:
        """Events of all streams of a partition from an offset on, about so many; none at its end,
        after waiting so long for one. For those who keep one order of their own."""
        await self.info()
        bytes_max = min(SCAN_BYTES_MAX, max(SCAN_BYTES_MIN, count * SCAN_EVENT_BYTES))
        deadline = self._engine.deadline(None)
        batches = await self._events.scan(partition, offset, bytes_max, deadline, wait_ms=wait_ms)
        return [
            event
            for batch in batches
            for event in self.decode_all(partition, batch)
            if (event.offset or 0) >= offset
        ]

    async def end_of(self, partition: int) -> int:
        """The offset after the newest event of a partition."""
        info = await self.info()
        found = await list_offsets(self._engine.cluster, info.name, self._engine.deadline(None))
        return found[partition].last_stable_offset

    async def page(self, stream: str, start: int) -> Page:
        """The next events of a stream from a version on, for subscriptions."""
        return await self._page(stream, start, self._engine.deadline(None))

    async def _page(self, stream: str, start: int, deadline: float) -> Page:
        partition = partition_for(stream.encode(), len((await self._info(deadline)).partitions))
        return await self._events.read(partition, stream, start, None, deadline)

    # ---- following

    def subscribe(
        self,
        streams: str = "*",
        *,
        event_types: Collection[str] | None = None,
        position: Position | str | None = None,
        from_now: bool = False,
        live: bool = True,
    ) -> EventSubscription:
        """Follow one stream by its name, several by its beginning (`"account-*"`), or all (`"*"`):
        what is there, then what comes, without a gap or a repeat.

        Events of one stream come in the order of their versions; those of different streams as
        they stand in their partitions. event_types: only those. position: go on from the `position`
        of an earlier subscription, whatever it followed. from_now: leave out what is there.
        live=False: end where the end is now. Raises `Misuse`.
        """
        if isinstance(position, str):
            position = Position.parse(position)
        if not isinstance(position, Position | None):
            raise Misuse(f"position = {position!r}: give `subscription.position`, or its text.")
        if position is not None and from_now:
            raise Misuse("Follow from a position or from now on, not both.")
        chosen = Filter.of(streams, event_types)
        return EventSubscription(self, chosen, start=position, from_now=from_now, live=live)

    def persistent_subscription(
        self,
        name: str,
        streams: str = "*",
        *,
        event_types: Collection[str] | None = None,
        config: PersistentConfig | None = None,
    ) -> EventConsumer:
        """Follow streams, as in `subscribe`, with a place that is kept on the server under a name,
        by any number of consumers that share the events; each is acknowledged on its own.

        All consumers of a name give the same streams and types: who meets another event settles it.
        config: how events are handed out; by default those of one stream one after the other.
        Raises `Misuse`, `ConfigError`; entering it raises as `engine.persistent_subscription` does.
        """
        return EventConsumer(self, name, Filter.of(streams, event_types), config)

    # ---- aggregates

    async def load_aggregate(
        self, kind: type[A], stream: str, *, timeout: float | None = None
    ) -> A:
        """The aggregate that a stream's events make, the older of them from a snapshot where there
        is one; an empty aggregate where there are no events. Raises `Misuse`, `RequestTimeout`."""
        check_stream(stream)
        deadline = self._engine.deadline(timeout)
        found = await self._snapshot_of(kind, stream, deadline)
        if found is not None:
            version, state = found
            page = await self._page(stream, version + 1, deadline)
            if page.head.before - 1 <= version <= page.head.last and not page.head.deleted:
                aggregate = kind()
                aggregate.restore(state)
                aggregate.version = version
                rest = self.read(stream, from_version=version + 1, timeout=timeout)
                return aggregate.replay([event async for event in rest])
        return kind.from_events(await self.load(stream, timeout=timeout))

    async def save(
        self, stream: str, aggregate: AggregateRoot, *, timeout: float | None = None
    ) -> None:
        """Append what an aggregate has recorded, on the condition that the stream is where the
        aggregate was loaded from. Raises as `append` does; after `WrongExpectedVersion` load anew
        and decide anew."""
        if not aggregate.recorded:
            return
        before = aggregate.version
        done = await self.append(
            stream, aggregate.recorded, expected_version=aggregate.version, timeout=timeout
        )
        aggregate.saved(done.version)
        every = self._snapshot_every
        if every is not None and (done.version + 1) // every > (before + 1) // every:
            try:
                await self.snapshot(stream, aggregate, timeout=timeout)
            except AegisError as error:  # the events are stored: loading them takes longer
                log.warning("There is no new snapshot of %r: %s", stream, error)

    async def snapshot(
        self, stream: str, aggregate: AggregateRoot, *, timeout: float | None = None
    ) -> None:
        """Keep the state of an aggregate as of its version, for `load_aggregate` to begin with.
        Raises `UnsupportedPayload` for a state that is not JSON-like, and as `append` does."""
        if aggregate.recorded or aggregate.version < 0:
            raise Misuse("A snapshot is of an aggregate whose events are stored; save it first.")
        check_stream(stream)
        kind = type(aggregate)
        data = {
            "kind": kind.__name__,
            "revision": kind.snapshot_revision,
            "version": aggregate.version,
            "state": aggregate.snapshot(),
        }
        event = Event(SNAPSHOT_TYPE, data, subject=aggregate.subject)
        rows = [[SETTINGS_PREFIX + stream, ExpectedVersion.ANY, event.id_bytes, {}]]
        await self._append_beside(stream, event, rows, self._engine.deadline(timeout))

    async def _snapshot_of(
        self, kind: type[AggregateRoot], stream: str, deadline: float
    ) -> tuple[int, Any] | None:
        """Version and state, unless the stream was deleted after it was taken."""
        partition = partition_for(stream.encode(), len((await self._info(deadline)).partitions))
        name = SETTINGS_PREFIX + stream
        page = await self._events.read(
            partition, name, None, DECISIONS_LOOKED_AT, deadline, backwards=True
        )
        for version, record in page.records:
            event = from_record(name, version, partition, record, self._keys)
            if event.event_type == CONDITION_TYPE:
                continue
            if event.event_type != SNAPSHOT_TYPE:
                if event.data.get(DELETED) or event.data.get(TOMBSTONE):
                    return None
                continue
            wanted = (kind.__name__, kind.snapshot_revision)
            if (event.data.get("kind"), event.data.get("revision")) == wanted:
                return event.data["version"], event.data["state"]
        return None

    # ---- the topic

    @property
    def _events(self) -> EventLink:
        if self._link is None:
            self._link = EventLink(self._engine.cluster, self._topic)
        return self._link

    async def info(self) -> TopicInfo:
        """The topic, made if it is not there. Raises `InvalidTopic`, `RequestTimeout`."""
        return await self._info(self._engine.deadline(None))

    async def _info(self, deadline: float) -> TopicInfo:
        """The topic, made if it is not there."""
        cluster = self._engine.cluster
        if self._topic not in cluster.metadata.topics:
            config = TopicConfig(partitions=self._partitions, retention=UNLIMITED, kind=EVENT_STORE)
            timeout = deadline - cluster.now()
            await self._engine.create_topic(self._topic, config, exist_ok=True, timeout=timeout)
        info = await cluster.topic(self._topic, deadline)
        if not info.settings.holds_events:
            raise InvalidTopic(
                f"Topic {self._topic!r} is of kind {info.settings.kind!r}, not {EVENT_STORE!r}, so"
                " it cannot hold streams of events. Use another topic."
            )
        return info


def _version(value: object) -> int:
    try:
        version = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        version = -10
    is_number = 0 <= version <= VERSION_MAX
    if isinstance(value, bool) or not (is_number or version in EXPECTED_WORDS):
        raise Misuse(
            f"expected_version = {value!r}: use the version of the stream's last event (0 or more),"
            " or ExpectedVersion.NO_STREAM, EXISTS or ANY."
        )
    return version


def _whole(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= VERSION_MAX:
        raise Misuse(f"{name} = {value!r}: use a whole number from 0 on, or None.")
    return value


def _age_ms(value: object) -> int | None:
    if value is None:
        return None
    try:
        if isinstance(value, timedelta):
            return _positive(int(value.total_seconds() * 1000))
        return _positive(parse_duration(value))
    except ValueError:
        raise Misuse(f"max_age = {value!r}: write a duration such as '30d'.") from None


def _positive(number: int) -> int:
    if number <= 0:
        raise ValueError(number)
    return number


def _events(stream: str, events: object) -> list[Event]:
    listed: list[Any] = [events] if isinstance(events, Event) else _listed(events)
    for event in listed:
        if not isinstance(event, Event):
            raise Misuse(f"An append to {stream!r} takes events, not {type(event).__name__}.")
    if not listed:
        raise Misuse(f"An append to {stream!r} needs at least one event.")
    if len(listed) > EVENTS_PER_APPEND_MAX:
        raise MessageTooLarge(
            f"An append of {len(listed)} events is over the limit of {EVENTS_PER_APPEND_MAX}."
            " Append fewer at a time.",
            have=len(listed),
            at_most=EVENTS_PER_APPEND_MAX,
        )
    return listed


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise Misuse(f"{name} is a mapping by the names of streams, not {type(value).__name__}.")


def _listed(events: Any) -> list[Any]:
    try:
        return list(events)
    except TypeError:
        raise Misuse(f"An append takes events, not {type(events).__name__}.") from None


def _check_ids(stream: str, events: Sequence[Event]) -> None:
    if len({event.id_bytes for event in events}) != len(events):
        raise Misuse(f"An append to {stream!r} has two events with one id.")


def _check_sizes(records: Sequence[Any], info: TopicInfo) -> None:
    limit, together = info.settings.max_message_bytes, 0
    for _, key, value, headers in records:
        size = len(key) + len(value or b"") + sum(len(content or b"") for _, content in headers)
        together += size + FRAMING_BYTES
        if size > limit + RECORD_OVERHEAD_BYTES:
            raise MessageTooLarge(
                f"An event of about {size} bytes is over the limit of {limit} of {info.name}.",
                have=size,
                at_most=limit,
            )
    if together + RECORD_OVERHEAD_BYTES > BATCH_BYTES_MAX:
        raise MessageTooLarge(
            f"The events of an append take about {together} bytes in a partition, over the limit of"
            f" {BATCH_BYTES_MAX}. Append fewer at a time.",
            have=together,
            at_most=BATCH_BYTES_MAX,
        )
