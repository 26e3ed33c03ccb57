"""The producer: records become batches, batches go to their partition's leader, answers come back.

The idea: records gather in one open batch a partition. While nothing is in flight to a leader its
open batches leave at once; while something is, they leave when they are full or have waited for
`linger`. So an idle producer has the lowest latency and a busy one the largest batches, by itself.
Order, sequences and retries are decided by `PartitionQueue`; this is the I/O around it.

The rule it protects: memory is bounded (`buffer_bytes`), and every record ends by its deadline, as
stored, refused or unknown.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from aegis_cluster.client.partition_queue import Outcome, PartitionQueue, PendingBatch
from aegis_cluster.client.stored import NO_OFFSET, Stored, StoredFuture
from aegis_cluster.errors import (
    AegisError,
    KeyRequired,
    MessageTooLarge,
    Misuse,
    NotLeader,
    OutcomeUnknown,
    OutOfOrderSequence,
    RequestTimeout,
    Unavailable,
)
from aegis_cluster.ids import TopicPartition
from aegis_cluster.limits import (
    BATCH_BYTES_DEFAULT,
    BATCH_RECORDS_MAX,
    BULK_BATCH_BYTES,
    CLIENT_BUFFER_BYTES_DEFAULT,
    MIB,
    REQUEST_PARTS_MAX,
)
from aegis_cluster.wire.batch import BatchBuilder, check_row
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.protocol import Acks, Api, Reply, take_int, take_list

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.client.link import Link
    from aegis_cluster.client.metadata import ShardAddress
    from aegis_cluster.wire.descriptions import TopicInfo

REQUEST_BYTES: Final = 4 * MIB
"""Batches for one shard travel together up to so much."""
REQUESTS_IN_FLIGHT: Final = 2
"""Per shard: one is worked on while the next is on its way. What is full meanwhile leaves together
in the one after, so a busy shard has fewer turns, writes and answers for the same bytes."""
RETRY_S: Final = 0.02
RETRY_S_MAX: Final = 0.25
EXPIRY_STEP_S: Final = 0.05
RENEW_S: Final = 5.0
"""How long to wait for another producer id before asking again."""
DEADLINE_SPREAD_S: Final = 1.0
"""Records share a batch, and with it the earliest of their deadlines, if these are so close."""
RECORD_OVERHEAD_BYTES: Final = 64
"""What a record takes in the buffer beside its bytes."""
PACKED_OVERHEAD_BYTES: Final = 20
"""The same in a batch, as a guess that is rarely too small: lengths, deltas, counts."""

Row = tuple[int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]
"""Time in milliseconds, key, value, headers."""


@dataclass(frozen=True, slots=True)
class ProducerOptions:
    batch_bytes: int = BATCH_BYTES_DEFAULT
    bulk_batch_bytes: int = BULK_BATCH_BYTES
    """Of records that are handed over many at once."""
    buffer_bytes: int = CLIENT_BUFFER_BYTES_DEFAULT
    linger_s: float = 0.005
    compression: str | None = None
    idempotent: bool = True
    """False: no producer id, so a leader cannot tell a retry, and may store it twice."""
    acks: Acks = Acks.QUORUM
    """Anything less goes without a producer id."""


class InTransaction(NamedTuple):
    """Whose transaction a producer sends in.

    join: have the coordinator know of partitions. sticky: where records without a key go next, by
    topic, so that the next transaction goes on from there.
    """

    transactional_id: str
    producer_id: int
    epoch: int
    join: Callable[[list[TopicPartition]], Awaitable[None]]
    sticky: dict[str, int]


class Columns:
    """Records that share headers, and a time where `times` has none for each; keys: None where
    none has one. A value of None is a tombstone."""

    __slots__ = ("_fixed_bytes", "headers", "keys", "largest", "times", "timestamp_ms", "values")

    def __init__(
        self,
        timestamp_ms: int,
        keys: Sequence[bytes] | None,
        values: Sequence[bytes | None],
        headers: list[tuple[str, bytes | None]],
        times: Sequence[int] | None = None,
    ) -> None:
        self.timestamp_ms = timestamp_ms
        self.keys = keys
        self.values = values
        self.headers = headers
        self.times = times
        self._fixed_bytes = row_bytes((0, None, None, headers))
        longest_key = max(map(len, keys)) if keys else 0
        self.largest = self._fixed_bytes + longest_key + max(_sizes(values))
        """What the largest of them takes in the buffer, or a little more."""

    def cut(self, start: int, count: int) -> tuple[_Cut, int]:
        """A part, and what it takes in the buffer, nearly."""
        values = self.values[start : start + count]
        size = len(values) * self._fixed_bytes + sum(_sizes(values))
        times = None if self.times is None else self.times[start : start + count]
        if self.keys is None:
            return (times or self.timestamp_ms, repeat(None), values), size
        keys = self.keys[start : start + count]
        return (times or self.timestamp_ms, keys, values), size + sum(map(len, keys))

    def rows(self) -> Iterator[Row]:
        """One by one."""
        times = repeat(self.timestamp_ms) if self.times is None else self.times
        keys: Iterable[bytes | None] = repeat(None) if self.keys is None else self.keys
        return zip(times, keys, self.values, repeat(self.headers))

    def chosen(self, places: Sequence[int]) -> Columns:
        """Those at these places."""
        keys, values, times = self.keys, self.values, self.times
        return Columns(
            self.timestamp_ms,
            None if keys is None else [keys[place] for place in places],
            [values[place] for place in places],
            self.headers,
            None if times is None else [times[place] for place in places],
        )


_Cut: TypeAlias = "tuple[int | Sequence[int], Iterable[bytes | None], Sequence[bytes | None]]"
"""Time or times, keys, values."""


def _sizes(values: Sequence[bytes | None]) -> Iterable[int]:
    if None in values:
        return [len(value or b"") for value in values]
    return map(len, values)  # type: ignore[arg-type]  # just looked


@dataclass(slots=True, eq=False)
class _Open:
    """A batch that still takes records.

    rows: the newest of them, which are packed all at once when the batch leaves.
    """

    builder: BatchBuilder
    future: StoredFuture
    since: float
    deadline: float
    left: int
    """Bytes that still fit, as records are packed; nearly."""
    rows: list[Row] = field(default_factory=list)
    count: int = 0
    room: int = 0
    """What its records take in the producer's buffer."""

    def takes(self, size: int, deadline: float) -> bool:
        """Whether one more record fits, and ends at about the same time as the others."""
        return (
            size <= self.left
            and abs(deadline - self.deadline) <= DEADLINE_SPREAD_S
            and self.count < BATCH_RECORDS_MAX
        )

    def pack(self) -> None:
        self.builder.append_rows(self.rows)
        self.rows = []


@dataclass(slots=True, eq=False)
class _Lane:
    """One partition of one topic."""

    info: TopicInfo
    partition: int
    queue: PartitionQueue = field(default_factory=PartitionQueue)
    open: _Open | None = None
    failures: int = 0
    needs_keys: bool = False
    """As the topic's settings say, and so does the next."""
    record_bytes_max: int = 0
    renewing: bool = False
    """A new producer id is being asked for."""
    admitted: bool = True
    """Part of the transaction, if any: nothing may be sent before its coordinator knows that."""

    @property
    def group(self) -> int:
        return self.info.partitions[self.partition].group


class Producer:
    """Belongs to one event loop."""

    def __init__(
        self,
        cluster: ClusterClient,
        options: ProducerOptions,
        *,
        on_batch: Callable[[StoredFuture], None] | None = None,
        within: InTransaction | None = None,
    ) -> None:
        """on_batch: hears of every batch that is begun, and can wait for its outcome. within: the
        transaction that everything belongs to."""
        self.is_ready = False
        """`start` would return at once, and raise nothing."""
        self.batch_filled = False
        """A batch is full and wants to leave; for callers that never wait (they take it back)."""
        self._on_batch = on_batch
        self._cluster = cluster
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._busy: dict[tuple[str, int], _Lane] = {}
        """Lanes with something open, waiting or in flight: only those are looked at."""
        self._sticky: dict[str, int] = {} if within is None else within.sticky
        self._buffered = 0
        self._room: list[asyncio.Future[None]] = []
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._within = within
        self._admitting = False
        self._producer_id: int | None = None if within is None else within.producer_id
        self._turn_soon: asyncio.Handle | None = None
        """The next look at what can be sent, once whoever runs now has come to its end."""
        self._turn_later: asyncio.TimerHandle | None = None
        """The same at some later time."""
        self._closed = False
        self._crash: Exception | None = None
        self._locating: set[asyncio.Task[None]] = set()

    # ---- for callers

    async def start(self, deadline: float) -> None:
        """Have a producer id. Raises `Unavailable`."""
        if self._crash is not None:
            raise Misuse(f"This producer has broken down: {self._crash!r}.") from self._crash
        if self._producer_id is None and self._options.idempotent:
            self._producer_id = await self._cluster.new_producer_id(deadline)
        self.is_ready = self._crash is None and not self._closed

    def choose_partition(self, info: TopicInfo) -> int:
        """For a record without a key: one partition until its batch leaves, then the next."""
        number = self._sticky.get(info.name)
        if number is None:
            number = self._sticky[info.name] = hash_start(self._cluster.client_id, info)
        return number % len(info.partitions)

    def try_add(
        self, info: TopicInfo, partition: int, row: Row, deadline: float
    ) -> tuple[StoredFuture, int] | None:
        """Put one record into its partition's open batch; None while the buffer is full.

        Returns the batch's future and the record's place in it. Raises `MessageTooLarge`,
        `KeyRequired`.
        """
        time_ms, key, value, headers = row
        size = RECORD_OVERHEAD_BYTES
        if key is not None:
            size += len(key)
        if value is not None:
            size += len(value)
        if headers:
            size += headers_bytes(headers)
        lane = self._lanes.get((info.name, partition))
        if lane is None or lane.info is not info:
            lane = self._lane(info, partition)
        if key is None and lane.needs_keys:
            raise KeyRequired(
                f"{info.name} is compacted, which keeps the latest message of each key: give the"
                " message a key.",
                topic=info.name,
            )
        if size > lane.record_bytes_max:
            raise MessageTooLarge(
                f"A message of {size} bytes is over the limit of {info.name}:"
                f" {info.settings.max_message_bytes}.",
                have=size,
                at_most=info.settings.max_message_bytes,
            )
        if self._buffered and self._buffered + size > self._options.buffer_bytes:
            return None
        check_row(0, time_ms, headers)
        opened = lane.open
        if opened is None or not opened.takes(size, deadline):
            opened = self._open_batch(lane, size, deadline, self._options.batch_bytes)
        elif deadline < opened.deadline:
            opened.deadline = deadline
        place = opened.count
        opened.rows.append(row)
        opened.count = place + 1
        opened.room += size
        opened.left -= size - RECORD_OVERHEAD_BYTES + PACKED_OVERHEAD_BYTES
        self._buffered += size
        if opened.left <= 0:
            self._close_batch(lane)
            self.batch_filled = True
            self._wake()
        return opened.future, place

    async def add(
        self, info: TopicInfo, partition: int, row: Row, deadline: float
    ) -> tuple[StoredFuture, int]:
        """As `try_add`, but wait for room. Raises `MessageTooLarge`, `RequestTimeout`."""
        while (added := self.try_add(info, partition, row, deadline)) is None:
            await self.wait_for_room(deadline)
        return added

    def try_add_columns(
        self, info: TopicInfo, partition: int, columns: Columns, start: int, deadline: float
    ) -> tuple[StoredFuture, int, int] | None:
        """Put records from `start` on into the partition's open batch, as many as fit it; None
        while the buffer is full.

        Returns the batch's future, the place of the first in it, and how many were taken. The
        caller has seen that none of them is too large.
        """
        largest = columns.largest
        room = self._options.buffer_bytes - self._buffered
        if self._buffered and largest > room:
            return None
        lane = self._lane(info, partition)
        opened = self._open_batch(lane, largest, deadline, self._options.bulk_batch_bytes)
        place = opened.count
        left = min(opened.left, room)
        count = max(1, min(left // largest, BATCH_RECORDS_MAX - place))
        cut, size = columns.cut(start, count)
        opened.pack()
        opened.builder.append_columns(*cut, columns.headers)
        opened.count = opened.builder.count
        opened.room += size
        opened.left = self._options.bulk_batch_bytes - opened.builder.size_bytes
        self._buffered += size
        if opened.left < largest:  # now, so that what has no key goes to the next partition
            self._close_batch(lane)
            self.batch_filled = True
            self._wake()
        return opened.future, place, opened.count - place

    @property
    def buffered_bytes(self) -> int:
        """Of all records that were added and have no outcome yet."""
        return self._buffered

    async def emptied(self) -> None:
        """Wait until every record has an outcome, also those that nobody waits for."""
        while self._buffered:
            await self.wait_for_room(float("inf"))

    def close_batches(self) -> None:
        """Let no open batch wait for more records."""
        for lane in self._lanes.values():
            self._close_batch(lane)
        self._wake()

    async def close(self) -> None:
        """Stop sending; what is not answered yet ends as unknown or unsent."""
        self._closed = True
        self.is_ready = False
        for turn in (self._turn_soon, self._turn_later):
            if turn is not None:
                turn.cancel()
        for task in self._locating:
            task.cancel()
        for lane in self._lanes.values():
            self._close_batch(lane)
            lane.queue.expire(float("inf"))

    # ---- batches

    def _lane(self, info: TopicInfo, partition: int) -> _Lane:
        lane = self._lanes.get((info.name, partition))
        if (
            lane is None
            or lane.info.partitions[partition].group != info.partitions[partition].group
        ):
            lane = _Lane(info, partition)
            lane.queue.producer_id = -1 if self._producer_id is None else self._producer_id
            if self._within is not None:
                lane.queue.epoch, lane.queue.transactional = self._within.epoch, True
                lane.admitted = False
            self._lanes[info.name, partition] = lane
        lane.info = info  # its settings may have changed
        lane.needs_keys = info.settings.compacts
        lane.record_bytes_max = info.settings.max_message_bytes + RECORD_OVERHEAD_BYTES
        return lane

    def _open_batch(self, lane: _Lane, size: int, deadline: float, batch_bytes: int) -> _Open:
        opened = lane.open
        if opened is not None:
            if opened.takes(size, deadline):
                opened.deadline = min(opened.deadline, deadline)
                return opened
            self._close_batch(lane)
            self.batch_filled = True
        compression = self._options.compression or lane.info.settings.compression
        builder = BatchBuilder(compression=compression)
        future = StoredFuture(self._loop)
        if self._on_batch is not None:
            self._on_batch(future)
        left = batch_bytes - builder.size_bytes
        lane.open = _Open(builder, future, self._loop.time(), deadline, left)
        self._busy[lane.info.name, lane.partition] = lane
        self._wake()
        return lane.open

    def _close_batch(self, lane: _Lane) -> None:
        """Hand the open batch to the queue."""
        opened = lane.open
        if opened is None:
            return
        lane.open = None
        opened.pack()
        if self._sticky.get(lane.info.name) == lane.partition:
            self._sticky[lane.info.name] = (lane.partition + 1) % len(lane.info.partitions)
        future, room = opened.future, opened.room

        def done(result: Outcome | AegisError) -> None:
            self._give_room(room)
            if future.done():
                return
            if isinstance(result, AegisError):
                future.set_exception(result)
                future.exception()  # whoever awaits it sees it; nobody has to
            else:
                stored = Stored(lane.partition, result[0], opened.count, result[1])
                future.set_result(stored)

        count = opened.count
        batch = PendingBatch(opened.builder, opened.deadline, done, count=count, size=room)
        if self._options.acks is Acks.NONE:
            batch.sent = lambda: _sent(future, lane.partition, count)
        lane.queue.add(batch)

    async def wait_for_room(self, deadline: float) -> None:
        """Return when something left the buffer. Raises `RequestTimeout`."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._room.append(waiter)
        self._wake()
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
        except TimeoutError:
            raise RequestTimeout("The producer's buffer stayed full until the deadline.") from None

    def _give_room(self, size: int) -> None:
        self._buffered -= size
        waiters, self._room = self._room, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # ---- sending

    def _wake(self) -> None:
        """Something changed: look, once whoever runs now has come to its end, what can be sent."""
        if self._turn_soon is None and not self._closed:
            self._turn_soon = self._loop.call_soon(self._turn)

    def _wake_later(self, pause: float) -> None:
        """Look again after so many seconds, or earlier: a look too early costs less than to put it
        off with every record."""
        at, due = self._loop.time() + pause, self._turn_later
        if due is not None and due.when() <= at:
            return
        if due is not None:
            due.cancel()
        self._turn_later = self._loop.call_at(at, self._later)

    def _later(self) -> None:
        self._turn_later = None
        self._wake()

    def _turn(self) -> None:
        """Send whatever can go, then wait until something changes or is due."""
        self._turn_soon = None
        if self._closed or self._crash is not None:
            return
        try:
            pause = self._pump()
        except Exception as error:  # noqa: BLE001 - top of a turn: nobody may wait for ever
            self._crashed(error)
            return
        if pause is not None:
            self._wake_later(pause)

    def _crashed(self, error: Exception) -> None:
        """A mistake of ours: everything under way ends as unknown, and later calls say why."""
        self._crash = error
        self.is_ready = False
        for lane in self._lanes.values():
            self._close_batch(lane)
            batches = [*lane.queue.in_flight, *lane.queue.waiting]
            lane.queue.in_flight.clear()
            lane.queue.waiting.clear()
            for batch in batches:
                batch.done(OutcomeUnknown(f"The producer broke down: {error!r}."))

    def _pump(self) -> float | None:
        """Send; return after how many seconds to look again, None when only news can help."""
        now = self._loop.time()
        pause: float | None = None
        by_shard: dict[ShardAddress, list[_Lane]] = defaultdict(list)
        for place, lane in list(self._busy.items()):
            if lane.open is not None and lane.open.deadline <= now:
                self._close_batch(lane)  # wherever it was to go, it ends here
            lane.queue.expire(now)
            if lane.open is None and not lane.queue.waiting:
                if lane.queue.in_flight:
                    pause = EXPIRY_STEP_S
                else:
                    del self._busy[place]
                continue
            pause = EXPIRY_STEP_S
            if not lane.admitted:
                self._admit()
                continue
            if lane.queue.needs_producer_id:
                if lane.queue.retry_at <= now:
                    self._renew(lane)
                continue
            address = self._cluster.metadata.address_of(lane.info, lane.partition)
            if address is None:
                self._locate(lane)
                continue
            by_shard[address].append(lane)
        for address, lanes in by_shard.items():
            left = self._pump_shard(address, lanes, now)
            pause = left if pause is None else min(pause, left)
        return pause

    def _pump_shard(self, address: ShardAddress, lanes: list[_Lane], now: float) -> float:
        """Send to one shard what may go; return when to look again."""
        link = self._cluster.link(address.endpoint)
        if not link.is_ready:
            self._start_link(link, lanes, now)
            return EXPIRY_STEP_S
        pause = EXPIRY_STEP_S
        busy = self._in_flight[address.endpoint]
        for lane in lanes:
            opened = lane.open
            if opened is not None:
                ripe_in = opened.since + self._options.linger_s - now
                if busy == 0 or ripe_in <= 0:
                    self._close_batch(lane)
                else:
                    pause = min(pause, ripe_in)
            if lane.queue.waiting and lane.queue.retry_at > now:
                pause = min(pause, lane.queue.retry_at - now)
        while self._in_flight[address.endpoint] < REQUESTS_IN_FLIGHT:
            batches = self._take(lanes, now)
            if not batches:
                break
            self._send(link, address, batches)
        return max(pause, 0.0005)

    def _take(self, lanes: list[_Lane], now: float) -> list[tuple[_Lane, PendingBatch]]:
        """Batches for one request, in turn from every partition."""
        taken: list[tuple[_Lane, PendingBatch]] = []
        size = 0
        moved = True
        while moved and size < REQUEST_BYTES and len(taken) < REQUEST_PARTS_MAX:
            moved = False
            for lane in lanes:
                if size >= REQUEST_BYTES or len(taken) >= REQUEST_PARTS_MAX:
                    break
                if not lane.queue.can_send(now):
                    continue
                moved = True
                batch = lane.queue.take()
                if batch is not None:
                    taken.append((lane, batch))
                    size += len(batch.data)
        return taken

    def _send(
        self, link: Link, address: ShardAddress, batches: list[tuple[_Lane, PendingBatch]]
    ) -> None:
        items = [[lane.group, lane.info.name, lane.partition] for lane, _ in batches]
        parts = [batch.data for _, batch in batches]
        deadline = max(batch.deadline for _, batch in batches)
        try:
            fields: list[Any] = [items]
            if self._within is not None:
                fields += [Acks.QUORUM, self._within.transactional_id]
            elif self._options.acks is not Acks.QUORUM:
                fields.append(self._options.acks)
            answered = partial(self._answered, address.endpoint, batches)
            link.send(Api.PRODUCE, fields, parts, deadline=deadline, done=answered)
        except AegisError as error:
            self._failed(batches, error, unanswered=False)
            return
        self._in_flight[address.endpoint] += 1
        for _, batch in batches:
            if batch.sent is not None:
                batch.sent()

    # ---- answers

    def _answered(
        self,
        endpoint: str,
        batches: list[tuple[_Lane, PendingBatch]],
        outcome: Reply | AegisError,
    ) -> None:
        self._in_flight[endpoint] -= 1
        try:
            if isinstance(outcome, AegisError):
                self._failed(batches, outcome, unanswered=isinstance(outcome, OutcomeUnknown))
            else:
                self._settle(batches, outcome)
        except Exception as error:  # noqa: BLE001 - as in a turn: nobody may wait for ever
            self._crashed(error)
        for lane in self._busy.values():
            if lane.open is not None or lane.queue.waiting:
                self._wake()
                return

    def _settle(self, batches: list[tuple[_Lane, PendingBatch]], reply: Reply) -> None:
        try:
            results = take_list(reply.fields, 0, "results")
        except AegisError:
            results = []
        for slot, (lane, batch) in enumerate(batches):
            try:
                result = take_list(results, slot, "result")
                self._settle_one(lane, batch, result)
            except AegisError as error:
                self._failed([(lane, batch)], error, unanswered=True)

    def _settle_one(self, lane: _Lane, batch: PendingBatch, result: Sequence[Any]) -> None:
        code = take_int(result, 0, "code")
        if code == 0:
            lane.failures = 0
            offset, time_ms = take_int(result, 1, "offset"), take_int(result, 2, "time")
            lane.queue.acknowledged(batch, (offset, time_ms))
            return
        error = error_from_reply(code, result[1:])
        if isinstance(error, NotLeader):
            self._cluster.metadata.note_leader(
                lane.info.partitions[lane.partition].group, error.details.get("leader")
            )
        if isinstance(error, OutOfOrderSequence) or not (
            error.retriable or isinstance(error, OutcomeUnknown)
        ):
            lane.queue.refused(batch, error)
        else:
            self._retry(lane, batch, unanswered=isinstance(error, OutcomeUnknown))

    def _failed(
        self, batches: list[tuple[_Lane, PendingBatch]], error: AegisError, *, unanswered: bool
    ) -> None:
        """A whole request failed: ask for other leaders and send again."""
        for lane, batch in batches:
            if unanswered or error.retriable:
                self._cluster.metadata.forget_leader(lane.info.partitions[lane.partition].group)
                self._retry(lane, batch, unanswered=unanswered)
            else:
                lane.queue.refused(batch, error)

    def _retry(self, lane: _Lane, batch: PendingBatch, *, unanswered: bool) -> None:
        lane.failures += 1
        pause = min(RETRY_S * 1.3**lane.failures, RETRY_S_MAX)
        lane.queue.retry(batch, unanswered=unanswered, at=self._loop.time() + pause)
        self._locate(lane)

    def _renew(self, lane: _Lane) -> None:
        """The partition's producer id has no epoch left: have another one for it."""
        if not lane.renewing and not self._closed:
            lane.renewing = True
            self._spawn(self._new_producer_id(lane))

    async def _new_producer_id(self, lane: _Lane) -> None:
        try:
            number = await self._cluster.new_producer_id(self._loop.time() + RENEW_S)
            lane.queue.renew(number)
        except AegisError:
            lane.queue.retry_at = self._loop.time() + RETRY_S_MAX  # asked again then
        finally:
            lane.renewing = False
        self._wake()

    def _admit(self) -> None:
        """Have the coordinator know of all partitions that are new to the transaction."""
        if not self._admitting and not self._closed:
            self._admitting = True
            self._spawn(self._join([lane for lane in self._lanes.values() if not lane.admitted]))

    async def _join(self, lanes: list[_Lane]) -> None:
        within = self._within
        places = [TopicPartition(lane.info.name, lane.partition) for lane in lanes]
        try:
            if within is not None:
                await within.join(places)
            for lane in lanes:
                lane.admitted = True
        except AegisError as error:
            for lane in lanes:
                self._close_batch(lane)
                lane.queue.fail(error)
        finally:
            self._admitting = False
        self._wake()

    def _start_link(self, link: Link, lanes: list[_Lane], now: float) -> None:
        """No connection there (yet): give it a moment, then try the partitions' other replicas."""
        for lane in lanes:
            if now < lane.queue.retry_at:
                continue
            lane.failures += 1
            lane.queue.retry_at = now + RETRY_S_MAX
            if lane.failures > 1:
                self._cluster.metadata.forget_leader(lane.info.partitions[lane.partition].group)
                self._locate(lane)
        self._spawn(self._await_link(link))

    async def _await_link(self, link: Link) -> None:
        try:
            await link.ready(self._loop.time() + RETRY_S_MAX)
        except AegisError:
            return
        for lane in self._lanes.values():
            lane.queue.retry_at = 0.0
        self._wake()

    def _locate(self, lane: _Lane) -> None:
        """Ask any node who leads, and whether the topic still is what we think."""
        if len(self._locating) < 8 and not self._closed:
            self._spawn(self._refresh(lane))

    async def _refresh(self, lane: _Lane) -> None:
        deadline = self._loop.time() + 1.0
        try:
            await self._cluster.refresh([lane.info.name], deadline)
        except Unavailable:
            return
        self._check_topic(lane)
        self._wake()

    def _check_topic(self, lane: _Lane) -> None:
        """A topic that is gone (or was made anew) refuses what is waiting for it."""
        try:
            info = self._cluster.metadata.topic(lane.info.name)
            gone = info.partitions[lane.partition].group != lane.group
        except AegisError:
            gone = True
        if gone:
            self._give_up(lane)

    def _give_up(self, lane: _Lane) -> None:
        waiting, lane.queue.waiting = list(lane.queue.waiting), type(lane.queue.waiting)()
        for batch in waiting:
            batch.done(
                OutcomeUnknown(f"{lane.info.name} was deleted while messages were under way.")
                if batch.unanswered
                else self._cluster.topic_gone(lane.info.name)
            )

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._locating.add(task)
        task.add_done_callback(self._locating.discard)


def _sent(future: StoredFuture, partition: int, count: int) -> None:
    """Nobody waits for the answer: leaving is enough."""
    if not future.done():
        future.set_result(Stored(partition, NO_OFFSET, count, time.time_ns() // 1_000_000))


def row_bytes(row: Row) -> int:
    """What a record takes in the buffer, nearly."""
    _, key, value, headers = row
    size = RECORD_OVERHEAD_BYTES
    if key is not None:
        size += len(key)
    if value is not None:
        size += len(value)
    return size + headers_bytes(headers)


def headers_bytes(headers: list[tuple[str, bytes | None]]) -> int:
    """What they take of that."""
    return sum([len(name) + len(content or b"") for name, content in headers])


def hash_start(client_id: str, info: TopicInfo) -> int:
    """Where a client begins with keyless records; clients begin at different partitions."""
    return int(client_id[:8], 16) % len(info.partitions)
