"""Reading single messages by their offsets, from what was read ahead or from a partition's leader.

The idea: a consumer that reads ahead for its subscription has most of what it is then given in
memory already (`remember`); the rest is fetched. What is remembered has a limit in bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.cluster import Pause
from aegis_cluster.errors import (
    AegisError,
    NotLeader,
    NotReady,
    OffsetOutOfRange,
    OutcomeUnknown,
    RequestTimeout,
)
from aegis_cluster.limits import MIB
from aegis_cluster.wire.batch import decode_columns
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.layout import batch_header
from aegis_cluster.wire.protocol import Api, take_int, take_list, take_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.ids import GroupId
    from aegis_cluster.wire.descriptions import TopicInfo
    from aegis_cluster.wire.records import Record, RecordColumns

REMEMBERED_BYTES_MAX: Final = 16 * MIB
FETCH_BYTES: Final = 1 * MIB
TRY_S: Final = 2.0
RECORD_BYTES: Final = 100
"""What a record takes beside its value, about."""


class _Kept:
    """One batch that was read: its records as rows, made when they are first asked for."""

    __slots__ = ("batch", "first", "last", "rows", "size")

    def __init__(self, batch: RecordColumns) -> None:
        self.batch = batch
        self.first = batch.first_offset
        self.last = batch.last_offset
        values = sum(map(len, filter(None, batch.values)))
        self.size = values + RECORD_BYTES * len(batch)
        self.rows: list[Record] | None = None

    def between(self, first: int, end: int) -> list[Record]:
        """The records with offsets in [first, end)."""
        if self.rows is None:
            self.rows = self.batch.records()
        rows = self.rows
        low = bisect_left(rows, first, key=_offset)
        high = bisect_left(rows, end, key=_offset)
        return rows[low:high]


class LeaseReader:
    """Of one topic; belongs to one event loop."""

    def __init__(self, cluster: ClusterClient, topic: str) -> None:
        self._cluster = cluster
        self._topic = topic
        self._kept: dict[GroupId, deque[_Kept]] = {}
        self._order: deque[GroupId] = deque()
        self._size = 0

    def remember(self, log: GroupId, batches: Iterable[RecordColumns]) -> None:
        """Keep what was read, as long as there is room; the oldest goes first."""
        for batch in batches:
            kept = _Kept(batch)
            self._kept.setdefault(log, deque()).append(kept)
            self._order.append(log)
            self._size += kept.size
        while self._size > REMEMBERED_BYTES_MAX and len(self._order) > 1:
            self._size -= self._kept[self._order.popleft()].popleft().size

    async def read(self, log: GroupId, first: int, end: int, deadline: float) -> list[Record]:
        """The records of [first, end) that (still) exist, in order.

        Raises `RequestTimeout`, `TopicNotFound`, `Corruption`.
        """
        found: dict[int, Record] = {}
        for kept in self._kept.get(log, ()):
            if kept.first < end and kept.last >= first:
                for record in kept.between(first, end):
                    found[record.offset] = record
        if len(found) == end - first:
            return list(found.values()) if _is_sorted(found) else _sorted(found)
        place = first
        while place < end:
            if place in found:
                place += 1
                continue
            batches, place = await self._fetch(log, place, deadline)
            self.remember(log, batches)
            for batch in batches:
                for record in _Kept(batch).between(first, end):
                    found[record.offset] = record
        return _sorted(found)

    async def _fetch(
        self, log: GroupId, offset: int, deadline: float
    ) -> tuple[list[RecordColumns], int]:
        """Batches from an offset on, and the offset behind all that they speak of.

        Only what a leader proves to be gone counts as that (something later is there, or the log
        begins later): one that was replaced without knowing it may just not have it.
        """
        pause = Pause(deadline)
        failure: AegisError | None = None
        while self._cluster.now() < deadline:
            info = await self._cluster.topic(self._topic, deadline)
            partition = next((p.partition for p in info.partitions if p.group == log), None)
            if partition is None:
                return [], offset + 1  # of a topic that was deleted: the message is no more
            try:
                return await self._try(info, partition, offset, deadline)
            except NotLeader as error:
                self._cluster.metadata.note_leader(log, error.details.get("leader"))
                failure = error
            except AegisError as error:
                if not error.retriable and not isinstance(error, OutcomeUnknown):
                    raise
                self._cluster.metadata.forget_leader(log)
                failure = error
            await pause.wait()
            await self._look_again(deadline)
        raise RequestTimeout(f"Offset {offset} of {self._topic} could not be read: {failure}")

    async def _look_again(self, deadline: float) -> None:
        try:
            await self._cluster.refresh([self._topic], min(deadline, self._cluster.now() + TRY_S))
        except AegisError:
            return

    async def _try(
        self, info: TopicInfo, partition: int, offset: int, deadline: float
    ) -> tuple[list[RecordColumns], int]:
        address = self._cluster.metadata.address_of(info, partition)
        if address is None:
            raise NotLeader("The nodes are not known yet.")
        until = min(deadline, self._cluster.now() + TRY_S)
        link = self._cluster.link(address.endpoint)
        await link.ready(until)
        items: list[Any] = [[info.partitions[partition].group, offset, FETCH_BYTES]]
        reply = await link.request(Api.FETCH, [0, items], deadline=until)
        result = take_list(take_list(reply.fields, 0, "results"), 0, "result")
        if take_int(result, 0, "code"):
            error = error_from_reply(result[0], result[1:])
            log_start = error.details.get("log_start")
            if isinstance(error, OffsetOutOfRange) and isinstance(log_start, int):
                if offset < log_start:
                    return [], log_start
                raise NotReady(f"The leader does not know of offset {offset} (yet).")
            raise error
        batches, behind = _decoded(bytes(take_part(reply.parts, 0, "frames")))
        if behind <= offset:
            raise NotReady(f"The leader does not know of offset {offset} (yet).")
        return batches, behind


def _decoded(frames: bytes) -> tuple[list[RecordColumns], int]:
    """Batches with records, and the offset behind everything that the frames speak of."""
    batches: list[RecordColumns] = []
    behind = 0
    for position, header in iter_frames(frames):
        if header.kind is not FrameKind.DATA:
            continue
        payload = frame_payload(frames, header, position)
        stored = batch_header(payload)
        behind = stored.base_offset + stored.last_offset_delta + 1
        batch = decode_columns(payload)
        if len(batch):
            batches.append(batch)
    return batches, behind


def _offset(record: Record) -> int:
    return record.offset


def _is_sorted(found: dict[int, Record]) -> bool:
    offsets: Sequence[int] = list(found)
    return offsets == sorted(offsets)


def _sorted(found: dict[int, Record]) -> list[Record]:
    return [found[offset] for offset in sorted(found)]
