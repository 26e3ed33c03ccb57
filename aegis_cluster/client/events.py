"""Appends to streams of events, and reads of them, at the leaders of their partitions.

The idea: whatever is appended in one turn of the event loop goes to each shard as one request, each
append a batch of its own with an answer of its own. Event ids make a repeat known, so what was not
answered is sent again until the deadline.

The rule it protects: an append ends as appended, as refused and certainly not appended, or, when
the deadline passes after it was sent, as unknown.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from aegis_cluster.client.cluster import ClusterClient, Pause
from aegis_cluster.client.fetcher import aborted_ranges, is_hidden
from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    OffsetOutOfRange,
    OutcomeUnknown,
    PeerViolation,
    RequestTimeout,
    StreamHeld,
    Unavailable,
)
from aegis_cluster.limits import MIB, REQUEST_PARTS_MAX
from aegis_cluster.wire.batch import decode_columns
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import FrameKind, frame_annotation, frame_payload, iter_frames
from aegis_cluster.wire.layout import batch_header
from aegis_cluster.wire.protocol import Api, is_none, take_bool, take_int, take_list, take_part

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from aegis_cluster.client.link import Link
    from aegis_cluster.client.metadata import ShardAddress
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.protocol import Reply
    from aegis_cluster.wire.records import Record, RecordColumns

T = TypeVar("T")

CONNECT_S: Final = 0.5
TRY_S: Final = 3.0
"""How long one leader may take before the next try."""
HELD_S: Final = 0.003
HELD_S_MAX: Final = 0.05
"""Between tries at a stream that a transaction holds, which mostly takes a few milliseconds."""
REQUEST_BYTES: Final = 8 * MIB
"""Batches of one request; a single larger one goes alone."""
READ_BYTES: Final = 1 * MIB
"""Frames of one answer."""


class Placed(NamedTuple):
    """What became of an append; versions: first and last of each of its streams. known: all of it
    stood there before."""

    offset: int
    time_ms: int
    versions: list[tuple[int, int]]
    known: bool = False


class StreamHead(NamedTuple):
    """last: version of the newest event, -1: none. before: what is below is hidden. deleted: 1
    until the next append, 2 for ever. stable: the end of what is decided in the partition."""

    last: int
    before: int
    deleted: int
    stable: int


class Page(NamedTuple):
    """Some versions of a stream, in the order asked for; following: where the rest begins."""

    head: StreamHead
    records: list[tuple[int, Record]]
    following: int | None


class _Item(NamedTuple):
    fields: list[Any]
    batch: bytes
    deadline: float
    future: asyncio.Future[list[Any]]


class EventLink:
    """Appends and reads of one topic; belongs to one event loop."""

    def __init__(self, cluster: ClusterClient, topic: str) -> None:
        self._cluster = cluster
        self._topic = topic
        self._queues: defaultdict[ShardAddress, list[_Item]] = defaultdict(list)
        self._tasks: set[asyncio.Task[None]] = set()

    async def append(
        self,
        partition: int,
        rows: Sequence[Sequence[Any]],
        batch: bytes,
        deadline: float,
        *,
        transactional_id: str | None = None,
    ) -> Placed:
        """Append to streams of one partition, all of it or nothing.

        rows: [stream, expected, ids, marks or None]. transactional_id: whose transaction the batch
        is a part of. Raises `WrongExpectedVersion`,
        `StreamDeleted`, `MessageTooLarge`, …; `RequestTimeout`, `OutcomeUnknown`.
        """

        async def attempt(info: TopicInfo, address: ShardAddress, until: float) -> Placed:
            group = info.partitions[partition].group
            fields = [group, [list(row) for row in rows], transactional_id]
            result = await self._submit(address, fields, batch, until)
            if take_int(result, 0, "code"):
                raise error_from_reply(result[0], result[1:])
            pairs = take_list(result, 3, "versions")
            versions = [(take_int(pair, 0, "first"), take_int(pair, 1, "last")) for pair in pairs]
            known = len(result) > 4 and take_bool(result, 4, "known")
            offset, time_ms = take_int(result, 1, "offset"), take_int(result, 2, "time")
            return Placed(offset, time_ms, versions, known)

        return await self._until_answered(partition, attempt, deadline, writes=True)

    async def read(
        self,
        partition: int,
        stream: str,
        start: int | None,
        limit: int | None,
        deadline: float,
        *,
        backwards: bool = False,
    ) -> Page:
        """Some of a stream's events, as of now. Raises `RequestTimeout`, `Corruption`, …."""

        async def attempt(info: TopicInfo, address: ShardAddress, until: float) -> Page:
            link = self._cluster.link(address.endpoint)
            await link.ready(min(until, self._cluster.now() + CONNECT_S))
            group = info.partitions[partition].group
            fields = [group, stream, start, limit, backwards, READ_BYTES]
            reply = await link.request(Api.EVENT_READ, fields, deadline=until)
            return _page_from(reply, start, limit, backwards=backwards)

        return await self._until_answered(partition, attempt, deadline, writes=False)

    async def scan(
        self, partition: int, offset: int, bytes_max: int, deadline: float, *, wait_ms: int = 0
    ) -> list[RecordColumns]:
        """What stands in a partition from an offset on, whole batches with their annotations;
        nothing at its end, after waiting so long. Raises `RequestTimeout`, `Corruption`, …."""
        while True:
            found, following = await self._scan(partition, offset, bytes_max, deadline, wait_ms)
            if found or following == offset:
                return found
            offset = following  # markers, and what was aborted

    async def _scan(
        self, partition: int, offset: int, bytes_max: int, deadline: float, wait_ms: int
    ) -> tuple[list[RecordColumns], int]:
        async def attempt(
            info: TopicInfo, address: ShardAddress, until: float
        ) -> tuple[list[RecordColumns], int]:
            link = self._cluster.link(address.endpoint)
            await link.ready(min(until, self._cluster.now() + CONNECT_S))
            group = info.partitions[partition].group
            fields = [wait_ms, [[group, offset, bytes_max]]]
            reply = await link.request(Api.FETCH, fields, deadline=until + wait_ms / 1000)
            (result,) = take_list(reply.fields, 0, "results")
            if take_int(result, 0, "code"):
                raise error_from_reply(result[0], result[1:])
            aborted, known_to = aborted_ranges(result)
            frames = bytes(take_part(reply.parts, 0, "frames"))
            return _batches(frames, offset, aborted, known_to)

        try:
            return await self._until_answered(partition, attempt, deadline, writes=False)
        except OffsetOutOfRange:
            return [], offset

    # ---- finding the leader

    async def _until_answered(
        self,
        partition: int,
        attempt: Callable[[TopicInfo, ShardAddress, float], Awaitable[T]],
        deadline: float,
        *,
        writes: bool,
    ) -> T:
        cluster, pause = self._cluster, Pause(deadline)
        held = Pause(deadline, first_s=HELD_S, longest_s=HELD_S_MAX)
        failure: AegisError = Unavailable("Its leader is not known.")
        unanswered = False
        while True:
            info = await cluster.topic(self._topic, deadline)
            group = info.partitions[partition].group
            address = cluster.metadata.address_of(info, partition)
            try:
                if address is None:
                    raise Unavailable("The cluster's nodes are not known yet.")
                return await attempt(info, address, min(deadline, cluster.now() + TRY_S))
            except NotLeader as error:
                cluster.metadata.note_leader(group, error.details.get("leader"))
                failure = error
            except StreamHeld as error:
                if cluster.now() >= deadline:
                    raise
                await held.wait()
                failure = error
                continue
            except AegisError as error:
                lost = isinstance(error, OutcomeUnknown | PeerViolation)
                if not error.retriable and not lost:
                    raise
                unanswered = unanswered or (lost and writes)
                failure = error
                if address is not None and not error.retriable:
                    cluster.metadata.forget_leader(group)
            if cluster.now() >= deadline:
                break
            await pause.wait()
            await self._look_again(deadline)
        if unanswered:
            raise OutcomeUnknown(
                f"The leader of {self._topic}/{partition} did not answer in time: {failure} The"
                " events may be stored; append them again with the same ids to make sure."
            )
        raise RequestTimeout(
            f"The leader of {self._topic}/{partition} could not be reached in time: {failure}"
        )

    async def _look_again(self, deadline: float) -> None:
        try:
            until = min(deadline, self._cluster.now() + CONNECT_S)
            await self._cluster.refresh([self._topic], until)
        except Unavailable:
            return

    # ---- many appends, few requests

    async def _submit(
        self, address: ShardAddress, fields: list[Any], batch: bytes, deadline: float
    ) -> list[Any]:
        loop = asyncio.get_running_loop()
        item = _Item(fields, batch, deadline, loop.create_future())
        queue = self._queues[address]
        queue.append(item)
        if len(queue) == 1:
            loop.call_soon(self._flush, address)
        late = loop.call_at(deadline, _give_up, item.future, address)  # far cheaper than a Timeout
        try:
            return await item.future
        finally:
            late.cancel()

    def _flush(self, address: ShardAddress) -> None:
        """Send what was queued in this turn of the loop."""
        for items in _requests(self._queues.pop(address, [])):
            try:
                link = self._cluster.link(address.endpoint)
                if link.is_ready:
                    _send(link, items)
                else:
                    self._send_once_ready(link, items)
            except AegisError as error:
                _settle(items, error)

    def _send_once_ready(self, link: Link, items: list[_Item]) -> None:
        async def wait() -> None:
            until = min(max(item.deadline for item in items), self._cluster.now() + CONNECT_S)
            try:
                await link.ready(until)
                _send(link, items)
            except AegisError as error:
                _settle(items, error)

        task = asyncio.get_running_loop().create_task(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _give_up(future: asyncio.Future[list[Any]], address: ShardAddress) -> None:
    if not future.done():
        future.set_exception(OutcomeUnknown(f"No answer came from {address.endpoint} in time."))


def _send(link: Link, items: list[_Item]) -> None:
    """Raises `Unavailable`: nothing was sent."""
    link.send(
        Api.EVENT_APPEND,
        [[item.fields for item in items]],
        [item.batch for item in items],
        deadline=max(item.deadline for item in items),
        done=partial(_settle, items),
    )


def _settle(items: list[_Item], outcome: Reply | AegisError) -> None:
    """Give each append its own result, or all of them what became of the request."""
    try:
        if isinstance(outcome, AegisError):
            raise outcome
        results = take_list(outcome.fields, 0, "results")
        for slot, item in enumerate(items):
            result = take_list(results, slot, "result")
            if not item.future.done():
                item.future.set_result(result)
    except AegisError as error:
        for item in items:
            if not item.future.done():
                item.future.set_exception(error)


def _requests(items: list[_Item]) -> Iterator[list[_Item]]:
    """Cut what is queued into requests of bounded size."""
    chosen: list[_Item] = []
    size = 0
    for item in items:
        if chosen and (len(chosen) == REQUEST_PARTS_MAX or size + len(item.batch) > REQUEST_BYTES):
            yield chosen
            chosen, size = [], 0
        chosen.append(item)
        size += len(item.batch)
    if chosen:
        yield chosen


def _page_from(reply: Reply, start: int | None, limit: int | None, *, backwards: bool) -> Page:
    """The versions that were asked for, out of the frames that hold them and others."""
    fields = reply.fields
    head = StreamHead(
        take_int(fields, 0, "last", low=-1),
        take_int(fields, 1, "before"),
        take_int(fields, 2, "deleted"),
        take_int(fields, 5, "stable"),
    )
    following = None if is_none(fields, 3, "next") else take_int(fields, 3, "next", low=-1)
    rows = take_list(fields, 4, "spans")
    frames = bytes(take_part(reply.parts, 0, "frames"))
    by_offset, scavenged = _by_offset(frames)
    records = []
    for slot in range(len(rows)):
        row = take_list(rows, slot, "span")
        first, count, offset = (take_int(row, at, "span") for at in range(3))
        for number in range(count):
            record = by_offset.get(offset + number)
            if record is not None:
                records.append((first + number, record))
            elif offset + number not in scavenged:
                raise PeerViolation("A stream's frames lack one of its events.", offset=offset)
    if backwards:
        records.sort(reverse=True, key=_version)
        high = head.last if start is None else start
        records = [one for one in records if head.before <= one[0] <= high]
    else:
        low = max(head.before, start or 0)
        records = [one for one in records if one[0] >= low]
    if limit is not None and len(records) >= limit:
        records, following = records[:limit], None
    return Page(head, records, following)


def _batches(
    frames: bytes, offset: int, aborted: Sequence[Sequence[int]], known_to: int | None
) -> tuple[list[RecordColumns], int]:
    """What readers see of these frames from an offset on, and the offset behind them."""
    found, start = [], offset
    for position, header in iter_frames(frames):
        if header.kind is not FrameKind.DATA:
            continue
        payload = frame_payload(frames, header, position)
        described = batch_header(payload)
        if known_to is not None and described.base_offset >= known_to:
            break
        offset = max(offset, described.base_offset + described.last_offset_delta + 1)
        if is_hidden(described, aborted):
            continue
        batch = decode_columns(payload)
        batch.annotation = bytes(frame_annotation(frames, header, position))
        batch.base_offset = described.base_offset
        if len(batch) and batch.last_offset >= start:
            found.append(batch)
    return found, offset


def _version(one: tuple[int, Record]) -> int:
    return one[0]


def _by_offset(frames: bytes) -> tuple[dict[int, Record], set[int]]:
    """The records of frames, and the offsets of those that were hidden once and are gone."""
    found: dict[int, Record] = {}
    scavenged: set[int] = set()
    for position, header in iter_frames(frames):
        if header.kind is FrameKind.DATA:
            payload = frame_payload(frames, header, position)
            records = decode_columns(payload).records()
            found.update((record.offset, record) for record in records)
            if header.is_rewritten:
                batch = batch_header(payload)
                first = batch.base_offset
                scavenged.update(range(first, first + batch.last_offset_delta + 1))
    return found, scavenged.difference(found)
