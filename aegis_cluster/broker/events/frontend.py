"""Requests about streams of events, as they reach a shard.

    append:  [[[group, [[stream, expected, ids, marks or None], ...], transactional id or None],
               ...]] and one batch per entry
        ->   [[[0, base_offset, time_ms, [[first, last], ...], known] or [code, message, details],
               ...]]; known: all of these events stood there before
    read:    [group, stream, from or None, limit or None, backwards, bytes_max]
        ->   [last, before, deleted, next or None, [[first, count, offset], ...], stable]
             and the frames that hold them as one part

An append is one batch and so one frame: all of its events or none. Its records are those of its
first stream, then those of the second, and so on; `ids` has 16 bytes for each. `stable` is where
whoever has read the stream goes on in the log.

With a transactional id the batch is that transaction's, and its only one in this partition. Its
streams are held until the transaction ends; who reads or appends to one meanwhile asks again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.broker.events.event_stm import Append, Prepared
from aegis_cluster.broker.events.indexer import Found, Indexer, Wanted
from aegis_cluster.broker.produce import ProduceCall, check_batch, refusal
from aegis_cluster.errors import (
    AegisError,
    InvalidBatch,
    InvalidTopic,
    MessageTooLarge,
    NotLeader,
    PeerViolation,
    Refused,
    StreamHeld,
)
from aegis_cluster.ids import GroupId, LogIndex, ProducerId
from aegis_cluster.limits import (
    ANNOTATION_BYTES_MAX,
    EVENT_READ_BYTES_MAX,
    EVENTS_PER_APPEND_MAX,
    REQUEST_PARTS_MAX,
    STREAM_NAME_CHARS_MAX,
    STREAMS_PER_APPEND_MAX,
    TRANSACTIONAL_ID_CHARS_MAX,
)
from aegis_cluster.wire.descriptions import EVENT_STORE
from aegis_cluster.wire.event_frames import (
    ANY,
    BEFORE,
    DELETED,
    EVENT_ID_BYTES,
    EXISTS,
    MAX_AGE_MS,
    MAX_COUNT,
    NO_STREAM,
    SETTINGS_PREFIX,
    SYSTEM_PREFIX,
    TOMBSTONE,
    encode_annotation,
)
from aegis_cluster.wire.layout import TRANSACTIONAL_BIT
from aegis_cluster.wire.protocol import (
    Api,
    Part,
    is_none,
    take_bool,
    take_bytes,
    take_int,
    take_list,
    take_map,
    take_str,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.broker.clients import Client
    from aegis_cluster.broker.events.event_stm import Decision
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.requests import Exchange
    from aegis_cluster.broker.shard import Shard
    from aegis_cluster.wire.batch import BatchHeader

EVENT_APIS: Final = frozenset({Api.EVENT_APPEND, Api.EVENT_READ})
_NUMBERS: Final = frozenset({BEFORE, MAX_COUNT, MAX_AGE_MS})
_SWITCHES: Final = frozenset({DELETED, TOMBSTONE})


class EventFrontend:
    """One per shard."""

    def __init__(self, shard: Shard, index_path: str | None) -> None:
        self._shard = shard
        self._indexer = Indexer(shard.manager.partitions, shard.transport.read_later, index_path)

    def handle(self, api: Api, exchange: Exchange, client: Client) -> None:
        """One request. Raises its refusal, `PeerViolation`, or answers through `exchange`."""
        if api is Api.EVENT_APPEND:
            self._append(exchange, client)
        else:
            self._read(exchange, client)

    def tick(self) -> None:
        self._indexer.tick()

    def close(self) -> None:
        """Let go of files, once nothing runs any more."""
        self._indexer.close()

    def _partition(self, group: GroupId) -> tuple[Partition, int]:
        """A partition of an event store that is led here, and its largest message."""
        partition = self._shard.manager.partitions.get(group)
        found = self._shard.table.partition_of(group)
        if partition is None or found is None:
            raise NotLeader("This shard has no replica of the partition; ask for metadata.")
        settings = found[0].settings
        if not settings.holds_events:
            raise InvalidTopic(
                f"Topic {found[0].name!r} is of kind {settings.kind!r}, not {EVENT_STORE!r}: it has"
                " no streams of events. Use another topic."
            )
        if not partition.serving:
            raise partition.unable()
        return partition, settings.max_message_bytes

    # ---- appends

    def _append(self, exchange: Exchange, client: Client) -> None:
        items = take_list(exchange.request.fields, 0, "appends", items_max=REQUEST_PARTS_MAX)
        parts = exchange.request.parts
        if len(items) != len(parts) or not items:
            raise PeerViolation("An append needs one batch for each entry.")
        parsed = [_parse_item(item) for item in items]
        size = sum(map(len, parts))
        clients = self._shard.clients
        clients.take(client, size)
        call = ProduceCall(
            len(parts),
            size,
            reply=lambda call: exchange.reply([call.results]),
            give_back=lambda part: clients.give_back(client, part),
        )
        for slot, (item, part) in enumerate(zip(parsed, parts, strict=True)):
            try:
                self._place(call, slot, item, part)
            except AegisError as error:
                call.settle(slot, refusal(error))

    def _place(self, call: ProduceCall, slot: int, item: _Item, part: Part) -> None:
        partition, largest = self._partition(item.group)
        batch = bytes(part)
        header = check_batch(batch, largest)
        _check_records(header, item)
        appending = _Appending(call, slot, partition, item.appends, batch, header)
        if item.transactional_id is None:
            self._decide(appending)
            return

        def go(error: AegisError | None) -> None:
            try:
                if error is not None:
                    raise error
                self._decide_within(appending)
            except AegisError as reason:
                call.settle(slot, refusal(reason))

        admission = self._shard.transactions.admission
        admission.admit(partition, header, item.transactional_id, go)

    def _decide_within(self, one: _Appending) -> None:
        """The batch of a transaction: a repeat is known by its producer, as everywhere."""
        partition, header = one.partition, one.header
        if not partition.serving:
            raise partition.unable()
        judged = partition.state.producers.decide(header)
        if judged.error is not None:
            one.answer(refusal(judged.error), judged.wait_for, own=False)
            return
        producer = ProducerId(header.producer_id)
        prepared = partition.state.events.prepared_by(producer)
        if judged.known is None and header.base_sequence == 0:
            self._decide(one, producer)
        elif judged.known is not None and prepared is not None:
            one.answer(_result(prepared), prepared.index, own=False)
        else:
            raise InvalidBatch("A transaction appends once in a partition, and sends nothing else.")

    def _decide(self, one: _Appending, producer: ProducerId | None = None) -> None:
        partition = one.partition
        decision = partition.state.events.decide(one.appends, transaction=producer is not None)
        if decision.error is not None or decision.known:
            one.answer(_answer_of(decision), decision.wait_for, own=False)
            return
        annotation = encode_annotation(decision.placed)
        if len(annotation) > ANNOTATION_BYTES_MAX:
            raise MessageTooLarge(
                f"The names and ids of an append's events take {len(annotation)} bytes, over the"
                f" limit of {ANNOTATION_BYTES_MAX}. Append fewer events at a time.",
                have=len(annotation),
                at_most=ANNOTATION_BYTES_MAX,
            )
        placed = partition.append(one.batch, one.header, annotation)
        index, offset, time_ms = placed.index, placed.base_offset, placed.time_ms
        partition.state.events.appended(
            decision.placed, index=index, offset=offset, time_ms=time_ms, producer=producer
        )
        result = _result(Prepared(decision.placed, index, offset, time_ms))
        one.answer(result, index, own=True)

    # ---- reads

    def _read(self, exchange: Exchange, client: Client) -> None:
        fields = exchange.request.fields
        partition, _ = self._partition(GroupId(take_int(fields, 0, "group")))
        _Read(self._shard, self._indexer, partition, exchange, client).begin()


class _Item(NamedTuple):
    """One append as it came."""

    group: GroupId
    appends: list[Append]
    transactional_id: str | None


class _Appending(NamedTuple):
    """One append of a request, on its way."""

    call: ProduceCall
    slot: int
    partition: Partition
    appends: list[Append]
    batch: bytes
    header: BatchHeader

    def answer(self, result: list[Any], wait_for: LogIndex, *, own: bool) -> None:
        """Once that index is committed."""
        waiter = _Answer(self.call, self.slot, self.partition, result, own=own)
        self.partition.wait_for(wait_for, waiter)


class _Answer:
    """Waits for the commit that an append's answer rests on; see `produce._Commit`."""

    __slots__ = ("_call", "_own", "_partition", "_result", "_slot")

    def __init__(
        self, call: ProduceCall, slot: int, partition: Partition, result: list[Any], *, own: bool
    ) -> None:
        self._call = call
        self._slot = slot
        self._partition = partition
        self._result = result
        self._own = own

    def committed(self) -> None:
        self._call.settle(self._slot, self._result)

    def lost(self, error: AegisError) -> None:
        told = error if self._own else self._partition.not_leader()
        self._call.settle(self._slot, refusal(told))


class _Read:
    """One question about a stream, as of a moment after it came (read index)."""

    def __init__(
        self,
        shard: Shard,
        indexer: Indexer,
        partition: Partition,
        exchange: Exchange,
        client: Client,
    ) -> None:
        fields = exchange.request.fields
        self._shard = shard
        self._indexer = indexer
        self._partition = partition
        self._exchange = exchange
        self._client = client
        self._stream = take_str(fields, 1, "stream", chars_max=STREAM_NAME_CHARS_MAX + 2)
        self._from = None if is_none(fields, 2, "from") else take_int(fields, 2, "from")
        self._limit = None if is_none(fields, 3, "limit") else take_int(fields, 3, "limit")
        self._backwards = take_bool(fields, 4, "backwards")
        self._bytes_max = take_int(fields, 5, "bytes_max", low=1, high=EVENT_READ_BYTES_MAX)
        self._head: list[Any] = []
        self._stable = 0

    def begin(self) -> None:
        """Raises `NotLeader`."""
        self._partition.wait_for_read(self)

    def lost(self, error: AegisError) -> None:
        self._exchange.refuse(error)

    def committed(self) -> None:
        fold = self._partition.state.events
        if fold.is_held(self._stream):
            # Its transaction may be decided, and somebody may have seen what it did elsewhere.
            self._exchange.refuse(
                StreamHeld(f"Stream {self._stream!r} is held by a transaction; ask again.")
            )
            return
        state, settings = fold.stream(self._stream), fold.settings(self._stream)
        self._stable = self._partition.last_stable_offset
        last = NO_STREAM if state is None else state.version
        before = settings.first_shown(last)
        deleted = 2 if settings.tombstone else int(settings.deleted)
        self._head = [last, before, deleted]
        low, high = _range(before, last, self._from, self._limit, backwards=self._backwards)
        if state is None or deleted or low > high:
            self._answer(Found([], b"", complete=True))
            return
        oldest = 0
        if settings.max_age_ms is not None:
            oldest = self._partition.now() - settings.max_age_ms
        wanted = Wanted(self._stream, low, high, self._backwards, self._bytes_max, max(0, oldest))
        self._shard.clients.set_aside(self._client, self._bytes_max)
        try:
            self._indexer.read(self._partition, wanted, index=state.index, answer=self._read_done)
        except Refused as error:
            self._read_done(error)

    def _read_done(self, found: Found | AegisError) -> None:
        self._shard.clients.set_aside(self._client, -self._bytes_max)
        if isinstance(found, AegisError):
            self._exchange.refuse(found)
        else:
            self._answer(found)

    def _answer(self, found: Found) -> None:
        rows = [[span.first, span.count, span.offset] for span in found.spans]
        following: int | None = None
        if not found.complete and found.spans:
            span = found.spans[-1]
            following = span.first - 1 if self._backwards else span.last + 1
        fields = [*self._head, following, rows, self._stable]
        self._exchange.reply(fields, [found.frames])


def _range(
    before: int, last: int, start: int | None, limit: int | None, *, backwards: bool
) -> tuple[int, int]:
    """Lowest and highest version of an answer; the first above the second: none."""
    if backwards:
        high = last if start is None else min(start, last)
        low = before if limit is None else max(before, high - limit + 1)
        return low, high
    low = before if start is None else max(start, before)
    return low, last if limit is None else min(last, low + limit - 1)


def _answer_of(decision: Decision) -> list[Any]:
    """Of a repeat, or of a refusal."""
    if decision.error is not None:
        return refusal(decision.error)
    known = decision.known
    versions = [[one.first, one.last] for one in known]
    return [0, known[0].offset, known[0].time_ms, versions, True]


def _result(prepared: Prepared) -> list[Any]:
    """Of what was appended now, or by the same producer before."""
    versions = [[one.first, one.last] for one in prepared.streams if one.count]
    return [0, prepared.offset, prepared.time_ms, versions, False]


def _check_records(header: BatchHeader, item: _Item) -> None:
    """The batch has one record for each event; outside of transactions, repeats are known by event
    ids alone."""
    count = sum(len(append.ids) for append in item.appends) // EVENT_ID_BYTES
    if header.count != count:
        raise InvalidBatch("An append's batch has other records than its streams have events.")
    if bool(header.attributes & TRANSACTIONAL_BIT) != (item.transactional_id is not None):
        raise InvalidBatch("A transaction's append comes with its id, and no other does.")
    if header.producer_id >= 0 and item.transactional_id is None:
        raise InvalidBatch("An append has no producer id; its events have ids.")
    if count > EVENTS_PER_APPEND_MAX:
        raise MessageTooLarge(
            f"An append of {count} events is over the limit of {EVENTS_PER_APPEND_MAX}. Append"
            " fewer at a time.",
            have=count,
            at_most=EVENTS_PER_APPEND_MAX,
        )


def _parse_item(item: Any) -> _Item:
    if not isinstance(item, list):
        raise PeerViolation("An append names its group and streams.")
    streams = take_list(item, 1, "streams", items_max=STREAMS_PER_APPEND_MAX)
    appends = [_parse_append(take_list(streams, slot, "stream")) for slot in range(len(streams))]
    name = None
    if len(item) > 2 and not is_none(item, 2, "transactional_id"):
        name = take_str(item, 2, "transactional_id", chars_max=TRANSACTIONAL_ID_CHARS_MAX)
    return _Item(GroupId(take_int(item, 0, "group")), appends, name)


def _parse_append(row: Sequence[Any]) -> Append:
    name = take_str(row, 0, "stream", chars_max=STREAM_NAME_CHARS_MAX + len(SETTINGS_PREFIX))
    expected = take_int(row, 1, "expected", low=EXISTS)
    if expected < 0 and expected not in (ANY, NO_STREAM, EXISTS):
        raise PeerViolation("An append expects a version or one of a few words.", have=expected)
    ids = take_bytes(row, 2, "ids", bytes_max=EVENT_ID_BYTES * 16_384)
    marks = None if is_none(row, 3, "marks") else _parse_marks(take_map(row, 3, "marks"))
    if not name or len(ids) % EVENT_ID_BYTES:
        raise PeerViolation("A stream has a name, and each of its events an id of 16 bytes.")
    if name.startswith(SYSTEM_PREFIX) != (marks is not None):
        raise PeerViolation("Streams with '$' are the store's own.", have=name)
    if marks is not None and not name.startswith(SETTINGS_PREFIX):
        raise PeerViolation("Marks belong to the settings of a stream.", have=name)
    return Append(name, expected, ids, marks)


def _parse_marks(marks: dict[str, Any]) -> dict[str, Any]:
    for name, value in marks.items():
        fits = name in _NUMBERS and (value is None or (type(value) is int and value >= 0))
        if not fits and not (name in _SWITCHES and type(value) is bool):
            raise PeerViolation("A stream has no such setting.", have=name)
    return marks
